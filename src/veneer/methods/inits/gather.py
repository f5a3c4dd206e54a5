"""What initialisers learn from data before the adapter exists: noted on the bare model's modules until it is built."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...core.select import saved_modules, targets
from ...errors import ConfigError, TargetError, listing
from ...files.write import write_atomically
from ...targets.target import Target, kind_of
from ...targets.walk import walk

if TYPE_CHECKING:
    from ..lora import LoraConfig

NOTES = "_veneer_start"


def linear_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules that `config` will adapt, by path.

    Raises:
        TargetError: some are not linear layers.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config, modules = copy.copy(config), dict(walk(model))
    paths = targets(model, config, saved_modules(model, config))
    others = [path for path in paths if kind_of(modules[path]).kind != "linear"]
    if others:
        raise TargetError(f"init_lora_weights {config.init_lora_weights!r} is for linear layers, not:{listing(others)}")
    return {path: modules[path] for path in paths}


def note(module: nn.Module, name: str, value: Any) -> None:
    module.__dict__.setdefault(NOTES, {})[name] = value


def taken(target: Target, name: str, config: Any) -> Any:
    """What was noted on a target's module, which forgets it.

    Raises:
        ConfigError: nothing was noted.
    """
    notes = target.base.__dict__.get(NOTES, {})
    if name in notes:
        value = notes.pop(name)
        if not notes:
            del target.base.__dict__[NOTES]
        return value
    if config.from_file:
        raise ConfigError(
            f"the file says init_lora_weights = {name!r}: it was made for a base model that its start was taken off, "
            "and does not hold that start. PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) "
            "writes one for the untouched base; on the changed base, load it with a config that says True"
        )
    how = {"corda": "preprocess_corda", "lora_ga": "preprocess_loraga"}[name]
    raise ConfigError(f"init_lora_weights {name!r} starts from data; call {how}(model, config, ...) before (see it)")


def alone(model: Any) -> AbstractContextManager[None]:
    """Inside, the base runs without the adapters that are on it."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def read_cache(path: str | Path | None) -> dict[str, Tensor] | None:
    """Tensors kept by an earlier run; None without any."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path is None or not Path(path).is_file() or not Path(path).stat().st_size:
        return None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path!r} was not written by veneer (it is no safetensors file): {error}") from None


def write_cache(path: str | Path | None, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), save({key: t.detach().cpu().contiguous() for key, t in tensors.items()}))


def cached(tensors: dict[str, Tensor], key: str, path: str) -> Tensor:
    """A tensor of a cache.

    Raises:
        ConfigError: it is not there; the cache belongs to other targets.
    """
    if key not in tensors:
        raise ConfigError(f"{path!r} was made for other targets: it holds nothing for {key!r}")
    return tensors[key]
