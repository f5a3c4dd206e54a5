"""Put another saved adapter into the place of one, in memory that stays: also under `torch.compile`, no recompiling.

    model = PeftModel.from_pretrained(base, "first")
    prepare_model_for_compiled_hotswap(model, target_rank=16)  # where the others' ranks are higher
    model = torch.compile(model)
    hotswap_adapter(model, "second")

Parameters are overwritten, never replaced, and compiled code holds on to them. Another scaling is folded into B, a
lower rank filled up with zeros.
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
"""Fields in which a LoRA that is swapped in may differ."""


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
        model_name_or_path: a directory, or a hub id.
        adapter_name: which adapter gives way; its name stays.
        torch_device: PEFT's; values go where the adapter is.
        check_base: refuse an adapter that was trained on another base model.
        hub: `subfolder`, `revision`, `token`, `cache_dir` and the like.

    Raises:
        CheckpointError: the file does not fit; nothing is changed. Modules the file lacks are set to no update, those
            only the file has are an error, as is a rank above the one in memory.
        VeneerError: no such adapter, or it is merged.
    """
    inner = _uncompiled(model)
    state = _swappable(inner, adapter_name)
    config, tensors, notes = checkpoint.load(model_name_or_path, **hub)
    fitted = _fitted(state, adapter_name, config, tensors)
    checkpoint.check_fit(inner.get_base_model(), state, adapter_name, fitted, notes, check_base)
    checkpoint.absorb(state, adapter_name, fitted)


@torch.no_grad()
def hotswap_tensors(model: nn.Module, adapter_name: str, config: Config, tensors: Tensors) -> None:
    """The same with the tensors of a file, by their keys there, that are in memory; raises the same."""
    state = _swappable(_uncompiled(model), adapter_name)
    fitted = _fitted(state, adapter_name, config, tensors)
    checkpoint.check(state, adapter_name, fitted)
    checkpoint.absorb(state, adapter_name, fitted)


def _swappable(model: Any, name: str) -> State:
    state = adapter_state(model, name)
    if any(name in layer.merged_adapters for layer in state.layers.values()):
        raise VeneerError(f"{name!r} is merged into the weights; call unmerge_adapter() before swapping it")
    return state


@torch.no_grad()
def prepare_model_for_compiled_hotswap(
    model: nn.Module, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
) -> None:
    """Give every LoRA on a model the rank of the largest one that will be swapped in, before it is compiled.

    The outputs stay as they are: the new rows and columns are zero, and the configs' r and alpha follow.

    Args:
        target_rank: the highest rank to come; None: only check.
        config: PEFT's; the configs on the model follow by themselves.
        check_compiled: "error", "warn" or "ignore" when the model is compiled already, and would be compiled anew.

    Raises:
        VeneerError: there is no LoRA, one has a higher rank, or the model is compiled.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise VeneerError(f"check_compiled must be 'error', 'warn' or 'ignore', not {check_compiled!r}")
    if _is_compiled(model) and check_compiled == "error":
        raise VeneerError("call prepare_model_for_compiled_hotswap before compiling the model")
    if _is_compiled(model) and check_compiled == "warn":
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled; it will be compiled "
            "again",
            stacklevel=2,
        )
    inner = _uncompiled(model)
    names = [n for n, c in getattr(inner, "peft_config", {}).items() if isinstance(c, LoraConfig)]
    if not names:
        raise VeneerError("the model has no LoRA adapter; load the first one before preparing to swap it")
    for name in names if target_rank is not None else ():
        _widen(adapter_state(inner, name), name, target_rank or 0)


def make_room(model: nn.Module, adapter_name: str, config: Config) -> None:
    """Give a LoRA the highest rank of one that is to take its place, unless compiled code holds on to its tensors."""
    state = adapter_state(_uncompiled(model), adapter_name)
    present = state.configs[adapter_name]
    if not (isinstance(present, LoraConfig) and isinstance(config, LoraConfig)):
        return
    if _is_compiled(model) or _keeps_rank(present, config):
        return
    rank = max([config.r, *config.rank_pattern.values()])
    if any(part.r < rank for _, part in checkpoint.parts(state, adapter_name) if isinstance(part, LoRA)):
        _widen(state, adapter_name, max([rank, present.r, *present.rank_pattern.values()]))


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules())


def _uncompiled(model: nn.Module) -> Any:
    return getattr(model, "_orig_mod", model)


def check_settings(present: Config, new: Config, name: str) -> None:
    """Raise unless the two differ in nothing but what can be fitted."""
    if present.peft_type != new.peft_type:
        raise CheckpointError(f"adapter {name!r} is {present.peft_type}, the file {new.peft_type}")
    free = FREE if isinstance(present, LoraConfig) and not _keeps_rank(present, new) else ()
    pairs = {f: (getattr(present, f), getattr(new, f)) for f in present.semantic_fields() if f not in free}
    other = [f"{field} = {a!r}, in the file {b!r}" for field, (a, b) in pairs.items() if a != b]
    if other:
        raise CheckpointError(f"the file's settings cannot take the place of adapter {name!r}'s:{listing(other)}")


def _keeps_rank(*configs: Any) -> bool:
    """A start that is subtracted again (PiSSA) belongs to one rank and one scaling, as some variants do."""
    moved = any(str(c.init_lora_weights) not in ("True", "False", "gaussian", "orthogonal") for c in configs)
    return moved or any(not variant.pads for c in configs for variant in c.classes())


def _fitted(state: State, name: str, config: Config, tensors: Tensors) -> Tensors:
    """The file's tensors in the shapes and the scaling of the adapter in memory."""
    check_settings(state.configs[name], config, name)
    if not isinstance(config, LoraConfig):
        return tensors
    found = {k: t for k, t in tensors.items() if k not in checkpoint.slots(state, name)}
    for prefix, part in checkpoint.parts(state, name):
        own = part.export()  # type: ignore[operator]
        given = {key: tensors[prefix + key] for key in own if prefix + key in tensors}
        if not given and isinstance(part, LoRA) and not state.configs[name].variants():  # type: ignore[attr-defined]
            found |= {prefix + key: t.new_zeros(t.shape) if "lora_" in key else t for key, t in own.items()}
        elif isinstance(part, LoRA):
            found |= {prefix + key: t for key, t in _fit(part, config, given, own).items()}
        else:
            found |= {prefix + key: t for key, t in given.items()}
    return found


def _fit(part: LoRA, config: LoraConfig, given: Tensors, own: Tensors) -> Tensors:
    with torch.device("meta"):
        new = config.build(part.target)
    if new.r > part.r:
        raise CheckpointError(
            f"the file has rank {new.r} on {part.target.path!r}, the adapter in memory {part.r}; call "
            f"prepare_model_for_compiled_hotswap(model, target_rank={new.r}) before the model is compiled"
        )
    factor, groups = new.scaling / part.scaling, part.target.groups
    return {key: _padded(t * factor if "_B" in key else t, own[key].shape, groups) for key, t in given.items()}


def _padded(t: Tensor, shape: torch.Size, groups: int = 1) -> Tensor:
    """Filled up with zeros; of a grouped convolution each group's share of the rows."""
    if t.dim() != len(shape):
        return t
    if groups > 1 and t.shape[0] % groups == 0 == shape[0] % groups:
        share = torch.Size((shape[0] // groups, *shape[1:]))
        return torch.cat([_padded(part, share) for part in t.chunk(groups)])
    more = [amount for have, want in zip(t.shape, shape, strict=True) for amount in (max(0, want - have), 0)]
    return F.pad(t, more[::-1])


def _widen(state: State, name: str, rank: int) -> None:
    config: Any = state.configs[name]
    layers = {path: state.layers[path] for path in state.adapters(name)}
    parts = {
        path: part for path, layer in layers.items() for part in layer.adapters[name].parts if isinstance(part, LoRA)
    }
    too_high = [f"{path}: r={part.r}" for path, part in parts.items() if part.r > rank]
    if too_high or _keeps_rank(config):
        kind = f"init_lora_weights={config.init_lora_weights!r} and variants {config.variants()}"
        why = f"ranks above it:{listing(too_high)}" if too_high else kind
        raise VeneerError(f"target_rank = {rank} cannot be given to adapter {name!r}, which has {why}")
    full = math.sqrt(rank) if config.use_rslora else rank
    for path, part in parts.items():
        _widen_part(layers[path], part, rank, part.scaling * full)
    alphas = {path: part.lora_alpha for path, part in parts.items()}
    first = next(iter(alphas.values()))
    config.r, config.rank_pattern, config.lora_alpha = rank, dict.fromkeys(config.rank_pattern, rank), first
    config.alpha_pattern = {path: alpha for path, alpha in alphas.items() if alpha != first}


def _widen_part(layer: AdapterLayer, part: LoRA, rank: int, alpha: float) -> None:
    own = {key: t for key, t in part.state_dict().items() if "lora_" in key and key.split(".")[0][-2:] in ("_A", "_B")}
    with torch.device("meta"):
        A, B = layer.target.factors(rank)
    for key, t in own.items():
        like = (A if "_A" in key else B).weight.shape
        shape = like if t.dim() == len(like) else t.shape
        holder: Any = part.get_submodule(key.rpartition(".")[0])
        name = key.rpartition(".")[2]
        setattr(holder, name, nn.Parameter(_padded(t, shape, part.target.groups), getattr(holder, name).requires_grad))
    part.r, part.lora_alpha = rank, int(alpha) if float(alpha).is_integer() else alpha
