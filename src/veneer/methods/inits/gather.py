"""Stores what initialisations compute from data before the adapter exists: on the bare model's modules, or in files."""

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
"""The attribute of a module that holds the values computed for it."""


def linear_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules that `config` will adapt, by path.

    Raises:
        TargetError: some are not linear layers.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    config = copy.copy(config)
    modules = dict(walk(model))
    paths = targets(model, config, saved_modules(model, config))
    others = [path for path in paths if kind_of(modules[path]).kind != "linear"]
    if others:
        raise TargetError(f"init_lora_weights {config.init_lora_weights!r} is for linear layers, not:{listing(others)}")
    return {path: modules[path] for path in paths}


def note(module: nn.Module, name: str, value: Any) -> None:
    """Store a value for the initialisation called `name` on a module."""
    notes = module.__dict__.setdefault(NOTES, {})
    notes[name] = value


def taken(target: Target, name: str, config: Any) -> Any:
    """Remove and return the value that `note` stored on a target's module.

    Raises:
        ConfigError: nothing was stored.
    """
    notes = target.base.__dict__.get(NOTES, {})
    if name in notes:
        value = notes.pop(name)
        if not notes:
            del target.base.__dict__[NOTES]
        return value
    if config.from_file:
        raise ConfigError(
            f"the file has init_lora_weights = {name!r}: it was trained on a base model from which its start was "
            "subtracted, and does not contain that start. PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...) writes a file for the unchanged base model; "
            "to load this file on the changed base model, set init_lora_weights to true in its config"
        )
    functions = {"corda": "preprocess_corda", "lora_ga": "preprocess_loraga"}
    raise ConfigError(
        f"init_lora_weights {name!r} is computed from data; call {functions[name]}(model, config, ...) first"
    )


def alone(model: Any) -> AbstractContextManager[None]:
    """A context in which the base model runs without its adapters."""
    if hasattr(model, "disable_adapter"):
        return model.disable_adapter()
    return nullcontext()


def read_cache(path: str | Path | None) -> dict[str, Tensor] | None:
    """The tensors that an earlier run stored; None if there is no such file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path is None:
        return None
    file = Path(path)
    if not file.is_file() or not file.stat().st_size:
        return None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path!r} was not written by veneer, since it is not a safetensors file: {error}") from None


def write_cache(path: str | Path | None, tensors: dict[str, Tensor]) -> None:
    """Store tensors for later runs, if a path is given."""
    from safetensors.torch import save

    if path is None:
        return
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    on_cpu = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    write_atomically(file, save(on_cpu))


def cached(tensors: dict[str, Tensor], key: str, path: str) -> Tensor:
    """A tensor from a cache file.

    Raises:
        ConfigError: the file has no such tensor, so it was written for other targets.
    """
    if key not in tensors:
        raise ConfigError(f"{path!r} was written for other targets: it has no entry for {key!r}")
    return tensors[key]
