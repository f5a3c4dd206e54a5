"""Coupling blocks: invertible maps made of two networks that need not be invertible."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]
Split = Callable[[Tensor], tuple[Tensor | float, Tensor]]
CLAMP = 5.0


def nice(out: Tensor) -> tuple[float, Tensor]:
    """A network's output as (scale, shift): it only shifts."""
    return 1.0, out


def glow(out: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the output scales, between exp(-CLAMP) and exp(CLAMP)."""
    s, t = out.chunk(2, dim=-1)
    return torch.exp(CLAMP * 2 / math.pi * torch.atan(s / CLAMP)), t


def couple(h: Tensor, F: Network, G: Network, split: Split) -> Tensor:
    """The first half of h moved by what F says of the second, then the second by what G says of the new first."""
    u, v = h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]
    scale, shift = split(F(v))
    u = scale * u + shift
    scale, shift = split(G(u))
    return torch.cat([u, scale * v + shift], dim=-1)


def uncouple(h: Tensor, F: Network, G: Network, split: Split) -> Tensor:
    """The inverse of `couple`."""
    u, v = h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]
    scale, shift = split(G(u))
    v = (v - shift) / scale
    scale, shift = split(F(v))
    return torch.cat([(u - shift) / scale, v], dim=-1)


COUPLINGS: dict[str, Split] = {"nice": nice, "glow": glow}
