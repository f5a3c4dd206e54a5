"""What training made of each adapted layer: how far its weight moved, and in how many directions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter, LowRank
from ..errors import NotMergeable
from ..maths.low_rank import effective_rank, singular_values
from ..model.peft_model import PeftModel

MOST_DENSE = 1024
"""Above this size the singular values of an update that is given as a whole matrix take too long."""


@dataclass(frozen=True)
class Trained:
    """One adapted module."""

    path: str
    parameters: int
    norm: float
    """Of the update of its weight; of the adapter's own numbers where it has no form as a weight."""
    relative_norm: float | None = None
    """Of the update, divided by that of the pretrained weight."""
    rank: int | None = None
    """The most that the update can have."""
    effective_rank: float | None = None
    """exp of the entropy of the update's normalised singular values."""


@torch.no_grad()
def layers(model: PeftModel, adapter_name: str = "default") -> list[dict[str, Any]]:
    """Of each adapted module, in the model's order."""
    return [asdict(_trained(path, adapter)) for path, adapter in model._state.adapters(adapter_name).items()]


@torch.no_grad()
def outside(model: PeftModel, adapter_name: str = "default") -> list[dict[str, Any]]:
    """Of each tensor that belongs to no layer: a prompt, a gate, shared parts."""
    state = model._state
    parts = [part for part in (state.shared.get(adapter_name), state.prompts.get(adapter_name)) if part is not None]
    tensors = [(name, t) for part in parts for name, t in part.named_parameters()]
    return [{"name": name, "shape": list(t.shape), "norm": float(t.float().norm())} for name, t in tensors]


def _trained(path: str, adapter: Adapter) -> Trained:
    count = sum(p.numel() for p in adapter.parameters())
    try:
        norm, relative, rank, effective = _update(adapter)
    except NotMergeable:
        return Trained(path, count, float(sum(p.double().square().sum() for p in adapter.parameters()) ** 0.5))
    return Trained(path, count, norm, relative, rank, effective)


def _update(adapter: Adapter) -> tuple[float, float, int | None, float | None]:
    """(norm, relative norm, rank, effective rank) of what an adapter adds to its weight."""
    W = adapter.target.original_weight()
    whole = float(W.float().norm()) or 1.0
    pair = _pair(adapter)
    if pair is not None:
        S = singular_values(pair)
        return float(S.norm()), float(S.norm()) / whole, len(S), effective_rank(S)
    D = _folded(adapter, W) - W.float()
    norm = float(D.norm())
    if D.dim() != 2 or max(D.shape) > MOST_DENSE:
        return norm, norm / whole, None, None
    return norm, norm / whole, min(D.shape), effective_rank(torch.linalg.svdvals(D))


def _pair(adapter: Adapter) -> tuple[Tensor, Tensor] | None:
    """A (r, in) and B (out, r) of a plain low-rank update."""
    if not isinstance(adapter, LowRank) or type(adapter).fold is not LowRank.fold:
        return None
    A, B = adapter.factors()
    return (A.double(), B.double()) if A.dim() == B.dim() == 2 and A.numel() else None


def _folded(adapter: Adapter, W: Tensor) -> Tensor:
    W, b = W.float(), adapter.target.original_bias()
    for part in adapter.parts:
        W, b = part.fold(W, b)
    return W
