"""PEFT's conversion to LoRA: `veneer.convert_to_lora` with PEFT's limits, defaults and messages."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checkpoint
from ..core.state import State
from ..errors import VeneerError
from ..files.read import PREFIX
from ..maths.low_rank import Pair, padded
from ..model import to_lora
from .configs import LoraConfig
from .layers import PeftLayer


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> tuple[Any, dict[str, Tensor]]:
    """Convert an adapter to a LoRA; return (config, tensors by key).

    Args:
        rank: the rank of every layer (an int), or the fraction of each update's energy to keep (a float).
        compile_kwargs: ignored; kept for PEFT compatibility. Decompositions gain nothing from compiling.

    Raises:
        TypeError: PEFT has no conversion for the method of a layer.
        ValueError: the rank is not possible, or the adapter trains biases.
    """
    state = _check(model, rank, adapter_name)
    pairs = _pairs(state, adapter_name, rank, progressbar)
    tensors: dict[str, Tensor] = {}
    for path, (A, B) in pairs.items():
        layer = state.layers[path]
        own = layer.adapters[adapter_name]
        parameter = next(itertools.chain(own.parameters(), _shared(own)))
        for key, factor in to_lora.keys(layer, A, B).items():
            tensors[key] = factor.to(parameter.dtype)
    for path, adapter in state.adapters(adapter_name).items():
        tensors |= to_lora.copies(path, adapter)
    is_peft_model = hasattr(model, "base_model") and hasattr(model, "peft_config")
    if not is_peft_model:
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    config = _config(state.configs[adapter_name], pairs, rank)
    return config, tensors


def _shared(adapter: Any) -> Iterator[nn.Parameter]:
    """The parameters that an adapter shares with those of other layers."""
    for part in adapter.parts:
        if isinstance(part.shared, nn.Module):
            yield from part.shared.parameters()


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> None:
    """Save an adapter as a LoRA; see `convert_to_lora`."""
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    config.inference_mode = True
    on_cpu = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    checkpoint.write(Path(path), on_cpu, {}, config)


def _check(model: nn.Module, rank: int | float, name: str) -> State:
    """Return the model's state; raise PEFT's errors for adapters that it cannot convert."""
    layers = [module for module in model.modules() if isinstance(module, PeftLayer) and not module.is_copy]
    state = layers[0].state if layers else None
    if state is None:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    config: Any = state.configs[name]
    if getattr(config, "bias", "none") != "none":
        raise VeneerError(
            f"The adapter's config sets bias={config.bias}, which a LoRA does not hold; it must be 'none'."
        )
    for layer in layers:
        if name in layer.adapters and not layer.supports_lora_conversion(name):
            raise TypeError("Some module types on this model do not support LoRA conversion.")
    sizes = [min(layer.target.in_features, layer.target.out_features) for layer in layers]
    _check_rank(rank, min(sizes))
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
    """The factors (A, B) of each layer's update, by path."""
    from tqdm import tqdm

    pairs: dict[str, Pair] = {}
    for path in tqdm(state.adapters(name), desc="Converting to LoRA", disable=not progressbar):
        update = to_lora.update_of(state.layers[path], name)
        if update is None:
            continue
        A, B = update.reduced(rank)
        if isinstance(rank, int):
            A, B = padded(A, B, rank)
        pairs[path] = A, B
    return pairs


def _config(old: Any, pairs: Mapping[str, Pair], rank: int | float) -> Any:
    if isinstance(rank, int):
        r = rank
        ranks = {}
    else:
        r = 1
        ranks = {path: A.shape[0] for path, (A, _) in pairs.items()}
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
