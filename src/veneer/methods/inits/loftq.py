"""LoftQ: quantise the weight and start the update at the quantisation error.

    W' = Q + s B A,  alternating  Q = q(W - s B A)  and  s B A = the best rank-r approximation of W - Q

Li et al., 2023, arXiv:2310.08659, algorithm 1. q: 4-bit NormalFloat in blocks of 64 (Dettmers et al., 2023,
arXiv:2305.14314, appendix E), or 8-bit integers with one scale for each row. Unlike in PEFT, the scaling s is divided
out of A and B.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.config import check_range
from ...errors import ConfigError
from ...files.checked import Settings
from ...targets.target import Target

BLOCK = 64
"""Number of values that share a scale in 4-bit NormalFloat."""


@dataclass
class LoftQConfig(Settings):
    """How LoftQ quantises."""

    loftq_bits: Literal[4, 8] = 4
    """4: NormalFloat in blocks of 64. 8: integers, one scale for each row."""
    loftq_iter: int = 1
    """Number of iterations; each one quantises the weight and fits the update to the error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, float("inf"), "loftq_iter")  # type: ignore[arg-type]


def loftq(target: Target, r: int, scaling: float, config: LoftQConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Q (out, in), A0 (r, in) and B0 (out, r) of a target's pretrained weight."""
    W = target.original_weight().float()
    update = torch.zeros_like(W)
    for _ in range(config.loftq_iter):
        Q = quantised(W - update, target, config.loftq_bits)
        A, B = best_fit(W - Q, r, scaling)
        update = scaling * B @ A
    return Q, A, B


def quantised(W: Tensor, target: Target, bits: int) -> Tensor:
    """W (out, in) rounded to the values that a quantised weight of the target can have."""
    if bits == 8:
        return int8(W)
    stored = target.as_stored(W)
    return target.as_matrix(nf4(stored))


def best_fit(residual: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) such that s B A is the best approximation of a matrix.

    Raises:
        ConfigError: the rank exceeds that of the matrix.
    """
    if r > min(residual.shape):
        raise ConfigError(f"LoftQ of rank {r} needs a weight of at least that rank, not {tuple(residual.shape)}")
    U, S, Vh = torch.linalg.svd(residual.float(), full_matrices=False)
    root = (S[:r] / scaling).sqrt()
    A = root[:, None] * Vh[:r]
    B = U[:, :r] * root
    return A, B


def nf4(W: Tensor) -> Tensor:
    """Round to the nearest 4-bit NormalFloat values, with each block of 64 scaled by its largest magnitude."""
    padded = F.pad(W.flatten(), (0, -W.numel() % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK))
    scale = _largest(blocks)
    levels = torch.tensor(normal_float(), dtype=blocks.dtype, device=W.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    nearest = torch.bucketize(blocks / scale, midpoints)
    values = (levels[nearest] * scale).flatten()
    return values[: W.numel()].view_as(W)


@cache
def normal_float() -> tuple[float, ...]:
    """The 16 NormalFloat values: quantiles of the normal distribution, 8 above zero, 7 below, scaled to [-1, 1]."""
    top = 0.9677083
    quantile = NormalDist().inv_cdf
    above = [quantile(top - (top - 0.5) * i / 8) for i in range(8)]
    below = [-quantile(top - (top - 0.5) * i / 7) for i in range(7)]
    values = sorted([*above, 0.0, *below])
    largest = max(above)
    return tuple(value / largest for value in values)


def int8(W: Tensor) -> Tensor:
    """Round to 255 evenly spaced values, with each row scaled by its largest magnitude."""
    scale = _largest(W) / 127
    return (W / scale).round() * scale


def _largest(rows: Tensor) -> Tensor:
    """The largest magnitude of each row, (rows, 1); never zero."""
    smallest = torch.finfo(rows.dtype).tiny
    return rows.abs().amax(1, keepdim=True).clamp_min(smallest)
