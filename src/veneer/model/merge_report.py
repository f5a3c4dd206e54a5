"""The rounding loss of a merge: weights in half precision cannot represent an update exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..core.state import state_of
from ..errors import NotMergeable, VeneerError


@dataclass(frozen=True)
class MergeLoss:
    """Rounding loss in one layer."""

    path: str
    norm: float
    """Norm of the update dW."""
    lost: float
    """Norm of the part of dW that is lost to rounding."""
    moved: float
    """Share of the weights that change."""

    @property
    def share(self) -> float:
        """|lost| / |dW|; 0 if there is no update."""
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class MergeReport:
    """Rounding loss of a merge in every layer; prints as a table."""

    layers: list[MergeLoss]

    @property
    def share(self) -> float:
        """The share of the whole update that is lost to rounding: |lost| / |dW| over all layers."""
        norm = sum(layer.norm**2 for layer in self.layers) ** 0.5
        lost = sum(layer.lost**2 for layer in self.layers) ** 0.5
        return lost / norm if norm else 0.0

    def __str__(self) -> str:
        lines = []
        for layer in self.layers:
            update = f"|dW| {layer.norm:9.3g}  lost {layer.share:7.2%}"
            lines.append(f"{layer.path:<50} {update}  weights moved {layer.moved:7.2%}")
        lines.append(f"{'all':<50} lost {self.share:.2%}")
        return "\n".join(lines)


@torch.no_grad()
def merge_report(model: Any, adapter_names: list[str] | None = None) -> MergeReport:
    """Report how much of the adapters' update a merge into the stored weights would lose; nothing is merged.

    Args:
        model: an adapted model.
        adapter_names: which adapters; None: the active ones.

    Raises:
        NotMergeable: a method cannot be merged.
        VeneerError: there is no such adapter, or one is merged already.
    """
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    state = state_of(base_model)
    active = state.active if state is not None else ()
    names = tuple(adapter_names or active)
    if state is None or not names or any(name not in state.configs for name in names):
        raise VeneerError(f"merge_report: the model has no adapters {names}")
    if any(layer.merged_adapters for layer in state.layers.values()):
        raise VeneerError(
            "merge_report predicts a merge, but an adapter is already merged; call unmerge_adapter() first"
        )
    losses = []
    for layer in state.layers.values():
        stack = layer.stack(names)
        if stack:
            losses.append(_loss(layer, stack))
    return MergeReport(losses)


def _loss(layer: Any, stack: list[Any]) -> MergeLoss:
    """The rounding loss of folding a stack of adapters into a layer's weight."""
    for part in stack:
        if not part.has_fold:
            raise NotMergeable(f"{type(part).__name__} on {layer.path!r} has no form as a weight")
    target = stack[0].target
    W = target.weight()
    b = target.bias()
    wide = torch.promote_types(W.dtype, torch.float32)
    old = W.to(wide)
    new = old
    bias = None if b is None else b.to(wide)
    for part in stack:
        new, bias = part.fold(new, bias)
    rounded = new.to(W.dtype).to(wide)
    norm = (new - old).norm()
    lost = (new - rounded).norm()
    moved = (rounded != old).double().mean()
    return MergeLoss(target.path, float(norm), float(lost), float(moved))
