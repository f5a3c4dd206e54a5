"""What LoRA's optimizers work on: the factors A and B of each layer's update, as parameters."""

from __future__ import annotations

from collections.abc import Iterator
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


def pairs(model: nn.Module) -> list[Pair]:
    """Those of the active LoRA adapters.

    Raises:
        VeneerError: there are none.
    """
    found = list(_pairs(model))
    if not found:
        raise VeneerError("the model has no active LoRA adapter, whose A and B this optimizer is made for")
    return found


def _pairs(model: Any) -> Iterator[Pair]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    state = state_of(base)
    for name in () if state is None else state.active:
        for adapter in state.adapters(name).values():
            for lora in (part for part in adapter.parts if isinstance(part, Started)):
                if lora.target.kind == "embedding":
                    yield Pair(lora.lora_embedding_A, lora.lora_embedding_B, lora)
                else:
                    yield Pair(lora.lora_A.weight, lora.lora_B.weight, lora)


def learning(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def replace_(gradient: Tensor, new: Tensor) -> None:
    gradient.copy_(new.view(gradient.shape))
