"""LoftQ: quantise the weight and start the update at what that loses.

    W' = Q + s B A,  by turns  Q = q(W - s B A)  and  s B A = the best rank-r approximation of W - Q

Li et al., 2023, arXiv:2310.08659, algorithm 1. q: 4-bit NormalFloat in blocks of 64 (Dettmers et al., 2023,
arXiv:2305.14314, appendix E) or 8-bit integers by rows. Unlike PEFT, the scaling is divided out.
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


@dataclass
class LoftQConfig(Settings):
    """How LoftQ quantises."""

    loftq_bits: Literal[4, 8] = 4
    """4: NormalFloat in blocks of 64. 8: integers, one scale for each row."""
    loftq_iter: int = 1
    """How often the quantised weight and the update are fitted to each other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, float("inf"), "loftq_iter")  # type: ignore[arg-type]


def loftq(target: Target, r: int, scaling: float, config: LoftQConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Q (out, in), A0 (r, in) and B0 (out, r) of a target's pretrained weight."""
    W = target.original_weight().float()
    update = torch.zeros_like(W)
    for _ in range(config.loftq_iter):
        Q = int8(W - update) if config.loftq_bits == 8 else target.as_matrix(nf4(target.as_stored(W - update)))
        A, B = best_fit(W - Q, r, scaling)
        update = scaling * B @ A
    return Q, A, B


def best_fit(residual: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B with s B A nearest to a matrix.

    Raises:
        ConfigError: the rank exceeds that of the matrix.
    """
    if r > min(residual.shape):
        raise ConfigError(f"LoftQ of rank {r} needs a weight of at least that rank, not {tuple(residual.shape)}")
    U, S, Vh = torch.linalg.svd(residual.float(), full_matrices=False)
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def nf4(W: Tensor) -> Tensor:
    """The nearest 4-bit NormalFloat values, each block of 64 scaled by its largest."""
    blocks = F.pad(W.flatten(), (0, -W.numel() % BLOCK)).unflatten(0, (-1, BLOCK))
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(blocks.dtype).tiny)
    levels = torch.tensor(normal_float(), dtype=blocks.dtype, device=W.device)
    nearest = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).flatten()[: W.numel()].view_as(W)


@cache
def normal_float() -> tuple[float, ...]:
    """The 16 values: quantiles of the normal distribution, 8 above zero and 7 below, scaled to [-1, 1]."""
    top, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(top - (top - 0.5) * i / 8) for i in range(8)]
    below = [-quantile(top - (top - 0.5) * i / 7) for i in range(7)]
    return tuple(sorted(v / max(above) for v in (*above, 0.0, *below)))


def int8(W: Tensor) -> Tensor:
    """The nearest of 255 even steps, each row scaled by its largest."""
    scale = W.abs().amax(1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny) / 127
    return (W / scale).round() * scale
