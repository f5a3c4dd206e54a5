"""PEFT's conversion to LoRA: the same as `veneer.convert_to_lora`, with PEFT's limits, defaults and words."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checkpoint
from ..core.state import State, state_of
from ..errors import VeneerError
from ..maths.low_rank import Pair, padded
from ..model import to_lora as convert
from .configs import LoraConfig
from .layers import PeftLayer


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> tuple[Any, dict[str, Tensor]]:
    """(config, tensors by key) of a LoRA with a rank for all layers, or with a share of each update (a float).

    Args:
        compile_kwargs: PEFT's; what is computed here is decompositions, which compile to the same calls.

    Raises:
        TypeError: a layer's method has no conversion in PEFT.
        ValueError: the rank, or a bias that is trained.
    """
    state = _check(model, rank, adapter_name)
    pairs = _pairs(state, adapter_name, rank, progressbar)
    prefix = "base_model.model." if hasattr(model, "base_model") and hasattr(model, "peft_config") else ""
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        dtype = next(state.layers[path].adapters[adapter_name].parameters()).dtype
        keys = convert.keys(state.layers[path], *pair)
        tensors |= {prefix + key.removeprefix("base_model.model."): t.to(dtype) for key, t in keys.items()}
    for path, adapter in state.adapters(adapter_name).items():
        copied = convert.copies(path, adapter)
        tensors |= {prefix + key.removeprefix("base_model.model."): t for key, t in copied.items()}
    return _config(state.configs[adapter_name], pairs, rank), tensors


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> None:
    """Write an adapter as a LoRA; see `convert_to_lora`."""
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    config.inference_mode = True
    checkpoint.write(Path(path), {key: t.cpu().contiguous() for key, t in tensors.items()}, {}, config)


def _check(model: nn.Module, rank: int | float, name: str) -> State:
    layers = [m for m in model.modules() if isinstance(m, PeftLayer) and not m.is_copy]
    state = layers[0].state if layers else state_of(model)
    if not layers or state is None:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    config: Any = state.configs[name]
    if getattr(config, "bias", "none") != "none":
        raise VeneerError(
            f"The adapter's config sets bias={config.bias}, which a LoRA does not hold; it must be 'none'."
        )
    if not all(layer.supports_lora_conversion(name) for layer in layers if name in layer.adapters):
        raise TypeError("Some module types on this model do not support LoRA conversion.")
    _check_rank(rank, min(min(layer.target.in_features, layer.target.out_features) for layer in layers))
    if config.peft_type == "LORA":
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that.",
            stacklevel=4,
        )
    return state


def _check_rank(rank: int | float, smallest: int) -> None:
    if rank == 0:
        raise VeneerError("Passing a rank of 0 doesn't make sense, please pass a valid value.")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise VeneerError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
        )
    if isinstance(rank, int) and rank > smallest:
        raise VeneerError(
            f"The chosen rank {rank} is larger than the weight shape ({smallest}), please choose a lower rank."
        )


@torch.no_grad()
def _pairs(state: State, name: str, rank: int | float, progressbar: bool) -> dict[str, Pair]:
    from tqdm import tqdm

    found: dict[str, Pair] = {}
    for path in tqdm(state.adapters(name), desc="Converting to LoRA", disable=not progressbar):
        update = convert.update_of(state.layers[path], name)
        if update is not None:
            A, B = update.reduced(rank)
            found[path] = padded(A, B, rank) if isinstance(rank, int) else (A, B)
    return found


def _config(old: Any, pairs: Mapping[str, Pair], rank: int | float) -> Any:
    ranks = {} if isinstance(rank, int) else {path: A.shape[0] for path, (A, _) in pairs.items()}
    r = rank if isinstance(rank, int) else 1
    return LoraConfig(  # type: ignore[call-arg]
        r=r,
        lora_alpha=r,
        rank_pattern=dict(ranks),
        alpha_pattern=dict(ranks),
        target_modules=list(pairs),
        modules_to_save=old.modules_to_save,
        task_type=old.task_type,
        base_model_name_or_path=old.base_model_name_or_path,
    )
