"""The parameters A and B of each LoRA layer, on which LoRA's optimizers work."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ...core.state import state_of
from ...errors import VeneerError
from ...methods.inits.start import Started


class Pair(NamedTuple):
    """The parameters A and B of one target, and the adapter that holds them."""

    A: nn.Parameter
    B: nn.Parameter
    lora: Any


def pairs(model: Any) -> list[Pair]:
    """A and B of every layer with an active LoRA adapter.

    Raises:
        VeneerError: there are none.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    state = state_of(base)
    result: list[Pair] = []
    if state is not None:
        for name in state.active:
            for adapter in state.adapters(name).values():
                result.extend(_pair(part) for part in adapter.parts if isinstance(part, Started))
    if not result:
        raise VeneerError("the model has no active LoRA adapter; this optimizer trains the matrices A and B of LoRA")
    return result


def _pair(lora: Any) -> Pair:
    if lora.target.kind == "embedding":
        return Pair(lora.lora_embedding_A, lora.lora_embedding_B, lora)
    return Pair(lora.lora_A.weight, lora.lora_B.weight, lora)


def learning(model: nn.Module) -> list[nn.Parameter]:
    """The model's trainable parameters."""
    return [p for p in model.parameters() if p.requires_grad]


def replace_(gradient: Tensor, new: Tensor) -> None:
    """Overwrite a gradient in place."""
    gradient.copy_(new.view(gradient.shape))
