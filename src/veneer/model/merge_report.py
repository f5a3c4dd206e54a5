"""What a merge would lose: a half-precision weight cannot hold all of an update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..core.state import state_of
from ..errors import NotMergeable, VeneerError


@dataclass(frozen=True)
class MergeLoss:
    """One layer: norms of the update dW and of the part that rounding takes, and the share of weights that move."""

    path: str
    norm: float
    lost: float
    moved: float

    @property
    def share(self) -> float:
        """|lost| / |dW|; 0 where there is no update."""
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class MergeReport:
    layers: list[MergeLoss]

    @property
    def share(self) -> float:
        """The share of the whole update that rounding takes: |lost| / |dW| over all layers."""
        norm = sum(layer.norm**2 for layer in self.layers) ** 0.5
        return sum(layer.lost**2 for layer in self.layers) ** 0.5 / norm if norm else 0.0

    def __str__(self) -> str:
        rows = [
            f"{e.path:<50} |dW| {e.norm:9.3g}  lost {e.share:7.2%}  weights moved {e.moved:7.2%}" for e in self.layers
        ]
        return "\n".join([*rows, f"{'all':<50} lost {self.share:.2%}"])


@torch.no_grad()
def merge_report(model: Any, adapter_names: list[str] | None = None) -> MergeReport:
    """How much of the adapters' update a merge into the weights as they are stored would lose; nothing is merged.

    Args:
        model: an adapted model.
        adapter_names: which adapters; None: the active ones.

    Raises:
        NotMergeable: a method has no form as a weight.
        VeneerError: no such adapter, or one is merged already.
    """
    state = state_of(model.get_base_model() if hasattr(model, "get_base_model") else model)
    names = tuple(adapter_names or (state.active if state is not None else ()))
    if state is None or not names or any(name not in state.configs for name in names):
        raise VeneerError(f"merge_report: the model has no adapters {names}")
    if any(layer.merged_adapters for layer in state.layers.values()):
        raise VeneerError("merge_report looks at a merge to come; call unmerge_adapter() first")
    losses = [_loss(layer, layer.stack(names)) for layer in state.layers.values() if layer.stack(names)]
    return MergeReport(losses)


def _loss(layer: Any, stack: list[Any]) -> MergeLoss:
    for part in stack:
        if not part.has_fold:
            raise NotMergeable(f"{type(part).__name__} on {layer.path!r} has no form as a weight")
    target = stack[0].target
    W, b = target.weight(), target.bias()
    wide = torch.promote_types(W.dtype, torch.float32)
    new, bias = W.to(wide), None if b is None else b.to(wide)
    for part in stack:
        new, bias = part.fold(new, bias)
    kept = new.to(W.dtype).to(wide)
    norm, lost = float((new - W.to(wide)).norm()), float((new - kept).norm())
    return MergeLoss(target.path, norm, lost, float((kept != W.to(wide)).double().mean()))
