"""What rounding to the file's dtype leaves of a change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

CHUNK = 1 << 24


@dataclass(frozen=True)
class Rounded:
    """One tensor that a merge changed."""

    name: str
    dtype: str
    change: float
    """Frobenius norm of dW = W' - W, W' summed in at least fp32."""
    error: float
    """Frobenius norm of the rounding error of W'."""
    moved: int
    """Numbers that dW changes."""
    unmoved: int
    """Those among them that rounding brings back to what they were."""

    @property
    def lost(self) -> float:
        """The rounding error as a share of dW."""
        return self.error / self.change if self.change else 0.0


def lost(tensors: Sequence[Rounded]) -> float:
    """The rounding error of all tensors as a share of dW."""
    change = math.hypot(*(t.change for t in tensors))
    return math.hypot(*(t.error for t in tensors)) / change if change else 0.0


def unmoved(tensors: Sequence[Rounded]) -> float:
    """The share of the numbers that dW changes and rounding brings back."""
    return sum(t.unmoved for t in tensors) / max(1, sum(t.moved for t in tensors))


def rounding(name: str, before: Tensor, exact: Tensor, new: Tensor) -> Rounded:
    """Compare W, W' and W' rounded, a piece at a time."""
    change = error = 0.0
    moved = back = 0
    pieces = (t.reshape(-1).split(CHUNK) for t in (before, exact, new))
    for W, W1, rounded in zip(*pieces, strict=True):
        wide = W.to(W1.dtype)
        moves = wide != W1
        change += float((W1 - wide).double().square().sum())
        error += float((rounded.to(W1.dtype) - W1).double().square().sum())
        moved += int(moves.sum())
        back += int((moves & (rounded == W)).sum())
    return Rounded(name, str(new.dtype).removeprefix("torch."), change**0.5, error**0.5, moved, back)
