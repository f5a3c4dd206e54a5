"""Coupling blocks: invertible maps built from two networks that need not be invertible."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]
Split = Callable[[Tensor], tuple[Tensor | float, Tensor]]
"""Splits a network's output into a scale and a shift."""
CLAMP = 5.0
"""The limit of GLOW's log scale."""


def nice(out: Tensor) -> tuple[float, Tensor]:
    """NICE: the output is the shift; the scale is 1."""
    return 1.0, out


def glow(out: Tensor) -> tuple[Tensor, Tensor]:
    """GLOW: the first half of the output gives the scale, between exp(-CLAMP) and exp(CLAMP), the second the shift."""
    s, shift = out.chunk(2, dim=-1)
    log_scale = CLAMP * 2 / math.pi * torch.atan(s / CLAMP)
    return torch.exp(log_scale), shift


COUPLINGS: dict[str, Split] = {"nice": nice, "glow": glow}


def couple(h: Tensor, F: Network, G: Network, split: Split) -> Tensor:
    """Scale and shift the first half of h by F of the second half, then the second half by G of the new first half."""
    u, v = _halves(h)
    scale, shift = split(F(v))
    u = scale * u + shift
    scale, shift = split(G(u))
    v = scale * v + shift
    return torch.cat([u, v], dim=-1)


def uncouple(h: Tensor, F: Network, G: Network, split: Split) -> Tensor:
    """The inverse of `couple`."""
    u, v = _halves(h)
    scale, shift = split(G(u))
    v = (v - shift) / scale
    scale, shift = split(F(v))
    u = (u - shift) / scale
    return torch.cat([u, v], dim=-1)


def _halves(h: Tensor) -> tuple[Tensor, Tensor]:
    middle = h.shape[-1] // 2
    return h[..., :middle], h[..., middle:]
