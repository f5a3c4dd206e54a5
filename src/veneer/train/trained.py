"""How training changed each adapted layer: the size of the update of its weight, and its effective rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter, LowRank
from ..errors import NotMergeable
from ..maths.low_rank import effective_rank, singular_values
from ..model.peft_model import PeftModel
from ..terminal import Step

MOST_DENSE = 1024
"""Largest side of a dense update whose singular values are computed; beyond it they take too long."""


@dataclass(frozen=True)
class Trained:
    """What training did to one adapted module."""

    path: str
    parameters: int
    norm: float
    """Frobenius norm of the update of the weight; of the adapter's parameters if it cannot be merged."""
    relative_norm: float | None = None
    """Norm of the update divided by that of the pretrained weight."""
    rank: int | None = None
    """Largest rank that the update can have."""
    effective_rank: float | None = None
    """exp of the entropy of the update's normalised singular values."""


@torch.no_grad()
def layers(
    model: PeftModel, adapter_name: str = "default", progress: Step = lambda what, done, of: None
) -> list[dict[str, Any]]:
    """The facts of each adapted module, in the model's order. `progress` is called after each."""
    adapters = model._state.adapters(adapter_name)
    facts = []
    for path, adapter in adapters.items():
        facts.append(asdict(_trained(path, adapter)))
        progress("measuring updates", len(facts), len(adapters))
    return facts


@torch.no_grad()
def outside(model: PeftModel, adapter_name: str = "default") -> list[dict[str, Any]]:
    """Name, shape and norm of each trained parameter outside the adapted layers, as of a prompt or a gate."""
    state = model._state
    facts = []
    for module in (state.shared.get(adapter_name), state.prompts.get(adapter_name)):
        if module is None:
            continue
        for name, parameter in module.named_parameters():
            norm = float(parameter.float().norm())
            facts.append({"name": name, "shape": list(parameter.shape), "norm": norm})
    return facts


def _trained(path: str, adapter: Adapter) -> Trained:
    parameters = sum(p.numel() for p in adapter.parameters())
    try:
        W = adapter.target.original_weight()
        pair = _factors(adapter)
        if pair is not None:
            return _trained_low_rank(path, parameters, pair, W)
        dW = _folded(adapter, W) - W.float()
    except NotMergeable:
        squares = sum(p.double().square().sum() for p in adapter.parameters())
        return Trained(path, parameters, float(squares**0.5))
    return _trained_dense(path, parameters, dW, W)


def _trained_low_rank(path: str, parameters: int, pair: tuple[Tensor, Tensor], W: Tensor) -> Trained:
    """The facts of an update B A, from its singular values."""
    S = singular_values(pair)
    norm = float(S.norm())
    return Trained(path, parameters, norm, norm / _norm(W), len(S), effective_rank(S))


def _trained_dense(path: str, parameters: int, dW: Tensor, W: Tensor) -> Trained:
    """The facts of an update that is given as a dense matrix."""
    norm = float(dW.norm())
    if dW.dim() != 2 or max(dW.shape) > MOST_DENSE:
        return Trained(path, parameters, norm, norm / _norm(W))
    S = torch.linalg.svdvals(dW)
    return Trained(path, parameters, norm, norm / _norm(W), min(dW.shape), effective_rank(S))


def _norm(W: Tensor) -> float:
    """The norm of a pretrained weight as a divisor: 1 if the weight is zero."""
    return float(W.float().norm()) or 1.0


def _factors(adapter: Adapter) -> tuple[Tensor, Tensor] | None:
    """A (r, in) and B (out, r) of a plain low-rank update; None for any other update."""
    if not isinstance(adapter, LowRank) or type(adapter).fold is not LowRank.fold:
        return None
    A, B = adapter.factors()
    if A.dim() != 2 or B.dim() != 2 or A.numel() == 0:
        return None
    return A.double(), B.double()


def _folded(adapter: Adapter, W: Tensor) -> Tensor:
    """The weight with the adapter folded in, in fp32."""
    W = W.float()
    b = adapter.target.original_bias()
    for part in adapter.parts:
        W, b = part.fold(W, b)
    return W
