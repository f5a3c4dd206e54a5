"""Hot swapping: overwrite an adapter with a saved one in place, without recompiling a compiled model.

    model = PeftModel.from_pretrained(base, "first")
    prepare_model_for_compiled_hotswap(model, target_rank=16)  # if the ranks of later adapters are higher
    model = torch.compile(model)
    hotswap_adapter(model, "second")

Parameters are overwritten, never replaced, because compiled code holds references to them. A different scaling is
folded into B; lower ranks are padded with zeros.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import checkpoint
from ..core.adapter import Tensors
from ..core.config import Config
from ..core.layer import AdapterLayer
from ..core.state import State
from ..errors import CheckpointError, VeneerError, listing
from ..methods.lora import LoRA, LoraConfig
from .to_lora import adapter_state

FREE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights")
"""Config fields in which the new LoRA may differ from the old one."""


@torch.no_grad()
def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str = "default",
    torch_device: str | None = None,
    *,
    check_base: bool = True,
    **hub: Any,
) -> None:
    """Overwrite the adapter called `adapter_name` with a saved one.

    Args:
        model: an adapted model, compiled or not.
        model_name_or_path: a directory or a hub id.
        adapter_name: which adapter to overwrite; it keeps its name.
        torch_device: ignored; kept for PEFT compatibility. The values go to the adapter's device.
        check_base: refuse an adapter that was trained on another base model.
        hub: `subfolder`, `revision`, `token`, `cache_dir` and the like.

    Raises:
        CheckpointError: the file does not fit; nothing is changed. Modules that only the file has are an error, as is
            a rank above the one in memory; modules that the file lacks are set to a zero update.
        VeneerError: there is no such adapter, or it is merged.
    """
    inner = _uncompiled(model)
    state = _swappable(inner, adapter_name)
    config, tensors, provenance, _ = checkpoint.load(model_name_or_path, **hub)
    fitted = _fitted(state, adapter_name, config, tensors)
    checkpoint.check_fit(inner.get_base_model(), state, adapter_name, fitted, provenance, check_base)
    checkpoint.absorb(state, adapter_name, fitted)


@torch.no_grad()
def hotswap_tensors(model: nn.Module, adapter_name: str, config: Config, tensors: Tensors) -> None:
    """Overwrite an adapter with tensors in memory, by their keys in a file; raises as `hotswap_adapter` does."""
    state = _swappable(_uncompiled(model), adapter_name)
    fitted = _fitted(state, adapter_name, config, tensors)
    checkpoint.check(state, adapter_name, fitted)
    checkpoint.absorb(state, adapter_name, fitted)


def _swappable(model: Any, name: str) -> State:
    """The state of a model whose adapter `name` exists and is not merged."""
    state = adapter_state(model, name)
    if any(name in layer.merged_adapters for layer in state.layers.values()):
        raise VeneerError(f"{name!r} is merged into the weights; call unmerge_adapter() before swapping it")
    return state


@torch.no_grad()
def prepare_model_for_compiled_hotswap(
    model: nn.Module, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
) -> None:
    """Pad every LoRA on a model to the highest rank that will be swapped in, before the model is compiled.

    The outputs do not change: the new rows and columns are zero, and r and alpha in the configs are updated.

    Args:
        model: an adapted model.
        target_rank: the highest rank that will be swapped in; None: only check the model.
        config: ignored; kept for PEFT compatibility. The configs on the model are updated.
        check_compiled: "error", "warn" or "ignore": what to do if the model is compiled already, since it would be
            compiled again.

    Raises:
        VeneerError: the model has no LoRA, one has a higher rank, or the model is compiled.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise VeneerError(f"check_compiled must be 'error', 'warn' or 'ignore', not {check_compiled!r}")
    is_compiled = _is_compiled(model)
    if is_compiled and check_compiled == "error":
        raise VeneerError("call prepare_model_for_compiled_hotswap before compiling the model")
    if is_compiled and check_compiled == "warn":
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled; it will be compiled "
            "again",
            stacklevel=2,
        )
    inner = _uncompiled(model)
    configs = getattr(inner, "peft_config", {})
    names = [name for name, config in configs.items() if isinstance(config, LoraConfig)]
    if not names:
        raise VeneerError("the model has no LoRA adapter; load the first one before preparing to swap it")
    if target_rank is None:
        return
    for name in names:
        _widen(adapter_state(inner, name), name, target_rank)


def make_room(model: nn.Module, adapter_name: str, config: Config) -> None:
    """Widen a LoRA to the highest rank in the config of its successor, unless the model is compiled."""
    state = adapter_state(_uncompiled(model), adapter_name)
    present = state.configs[adapter_name]
    if not (isinstance(present, LoraConfig) and isinstance(config, LoraConfig)):
        return
    if _is_compiled(model) or _keeps_rank(present, config):
        return
    rank = _highest_rank(config)
    loras = [part for _, part in checkpoint.parts(state, adapter_name) if isinstance(part, LoRA)]
    if any(lora.r < rank for lora in loras):
        _widen(state, adapter_name, max(rank, _highest_rank(present)))


def _highest_rank(config: LoraConfig) -> int:
    return max([config.r, *config.rank_pattern.values()])


def _is_compiled(model: nn.Module) -> bool:
    if hasattr(model, "_orig_mod"):
        return True
    return any(module._compiled_call_impl is not None for module in model.modules())


def _uncompiled(model: nn.Module) -> Any:
    return getattr(model, "_orig_mod", model)


def check_settings(present: Config, new: Config, name: str) -> None:
    """Raise CheckpointError if two configs differ in a field that hot swapping cannot adapt."""
    if present.peft_type != new.peft_type:
        raise CheckpointError(f"adapter {name!r} is {present.peft_type}, the file {new.peft_type}")
    can_adapt = isinstance(present, LoraConfig) and not _keeps_rank(present, new)
    differences = []
    for field in present.semantic_fields():
        if can_adapt and field in FREE:
            continue
        old_value = getattr(present, field)
        new_value = getattr(new, field)
        if old_value != new_value:
            differences.append(f"{field} = {old_value!r}, in the file {new_value!r}")
    if differences:
        raise CheckpointError(f"the file's settings cannot take the place of adapter {name!r}'s:{listing(differences)}")


def _keeps_rank(*configs: Any) -> bool:
    """Whether any of the configs ties its LoRA to one rank and one scaling.

    An initialisation that is subtracted again (PiSSA) does, and so do some variants.
    """
    for config in configs:
        is_subtracted = str(config.init_lora_weights) not in ("True", "False", "gaussian", "orthogonal")
        if is_subtracted or not all(variant.pads for variant in config.classes()):
            return True
    return False


def _fitted(state: State, name: str, config: Config, tensors: Tensors) -> Tensors:
    """The file's tensors in the shapes and the scaling of the adapter in memory."""
    present: Any = state.configs[name]
    check_settings(present, config, name)
    if not isinstance(config, LoraConfig):
        return tensors
    slots = checkpoint.slots(state, name)
    fitted = {key: t for key, t in tensors.items() if key not in slots}  # left to the caller's check
    for prefix, part in checkpoint.parts(state, name):
        old = part.export()  # type: ignore[operator]
        new = {key: tensors[prefix + key] for key in old if prefix + key in tensors}
        if isinstance(part, LoRA):
            is_missing = not new and not present.variants()
            new = _zero_update(old) if is_missing else _fit(part, config, new, old)
        for key, t in new.items():
            fitted[prefix + key] = t
    return fitted


def _zero_update(old: Tensors) -> Tensors:
    """The tensors of a LoRA whose factors are zero."""
    return {key: t.new_zeros(t.shape) if "lora_" in key else t for key, t in old.items()}


def _fit(part: LoRA, config: LoraConfig, tensors: Tensors, old: Tensors) -> Tensors:
    """A LoRA's tensors from the file, padded and scaled for the LoRA in memory, whose own tensors are `old`."""
    with torch.device("meta"):
        new = config.build(part.target)
    if new.r > part.r:
        raise CheckpointError(
            f"the file has rank {new.r} on {part.target.path!r}, the adapter in memory {part.r}; call "
            f"prepare_model_for_compiled_hotswap(model, target_rank={new.r}) before the model is compiled"
        )
    factor = new.scaling / part.scaling
    fitted = {}
    for key, t in tensors.items():
        scaled = t * factor if "_B" in key else t
        fitted[key] = _padded(scaled, old[key].shape, part.target.groups)
    return fitted


def _padded(t: Tensor, shape: torch.Size, groups: int = 1) -> Tensor:
    """A tensor padded with zeros to a shape; in a grouped convolution the rows of each group are padded separately."""
    if t.dim() != len(shape):
        return t
    if groups > 1 and t.shape[0] % groups == 0 == shape[0] % groups:
        share = torch.Size((shape[0] // groups, *shape[1:]))
        return torch.cat([_padded(group, share) for group in t.chunk(groups)])
    padding = []  # (before, after) of each dimension, the last dimension first
    for size, wanted in zip(reversed(t.shape), reversed(shape), strict=True):
        padding += [0, max(0, wanted - size)]
    return F.pad(t, padding)


def _widen(state: State, name: str, rank: int) -> None:
    """Pad a LoRA to a rank on all of its layers, and update its config."""
    config: Any = state.configs[name]
    parts = {}
    for path in state.adapters(name):
        for part in state.layers[path].adapters[name].parts:
            if isinstance(part, LoRA):
                parts[path] = part
    _check_can_widen(config, parts, name, rank)
    divisor = math.sqrt(rank) if config.use_rslora else rank
    for path, part in parts.items():
        _widen_part(state.layers[path], part, rank, part.scaling * divisor)
    alphas = {path: part.lora_alpha for path, part in parts.items()}
    first_alpha = next(iter(alphas.values()))
    config.r = rank
    config.rank_pattern = dict.fromkeys(config.rank_pattern, rank)
    config.lora_alpha = first_alpha
    config.alpha_pattern = {path: alpha for path, alpha in alphas.items() if alpha != first_alpha}


def _check_can_widen(config: Any, parts: dict[str, LoRA], name: str, rank: int) -> None:
    too_high = [f"{path}: r={part.r}" for path, part in parts.items() if part.r > rank]
    if too_high:
        reason = f"ranks above it:{listing(too_high)}"
    elif _keeps_rank(config):
        reason = f"init_lora_weights={config.init_lora_weights!r} and variants {config.variants()}"
    else:
        return
    raise VeneerError(f"target_rank = {rank} cannot be given to adapter {name!r}, which has {reason}")


def _widen_part(layer: AdapterLayer, part: LoRA, rank: int, alpha: float) -> None:
    """Pad the factors of one LoRA to a rank, and set its r and alpha."""
    with torch.device("meta"):
        A, B = layer.target.factors(rank)
    for key, t in part.state_dict().items():
        attribute = key.split(".")[0]
        if "lora_" not in key or not attribute.endswith(("_A", "_B")):
            continue
        factor = A if "_A" in key else B
        shape = factor.weight.shape if t.dim() == factor.weight.dim() else t.shape
        _replace_parameter(part, key, _padded(t, shape, part.target.groups))
    part.r = rank
    part.lora_alpha = int(alpha) if float(alpha).is_integer() else alpha


def _replace_parameter(module: nn.Module, key: str, value: Tensor) -> None:
    """Bind a new parameter at a key of the state dict; requires_grad is kept."""
    path, _, name = key.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, name)
    setattr(owner, name, nn.Parameter(value, old.requires_grad))
