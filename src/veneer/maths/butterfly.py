"""Butterfly products: a dense rotation as a few block-diagonal ones between shuffles."""

from __future__ import annotations

import torch
from torch import Tensor


def butterfly(x: Tensor, R: Tensor, inverse: bool = False) -> Tensor:
    """x (..., D H) times M_(n-1) ... M_0 of orthogonal blocks R (n, D, H, H), or times its inverse."""
    for i in range(len(R)) if inverse else reversed(range(len(R))):
        x = _factor(x, R[i].mT if inverse else R[i], i)
    return x


def _factor(x: Tensor, blocks: Tensor, i: int) -> Tensor:
    """x M_i: within groups of 2^i blocks, entries 2^i half blocks apart meet in one block.

    Half blocks dealt alternately to two hands lie as (2, 2^i, half); undealt they are (2^i, 2, half).
    """
    D, H, _ = blocks.shape
    if i:
        x = x.unflatten(-1, (D >> i, 2, 1 << i, H // 2)).transpose(-3, -2).flatten(-4)
    x = torch.einsum("...di,dij->...dj", x.unflatten(-1, (D, H)), blocks).flatten(-2)
    if i:
        x = x.unflatten(-1, (D >> i, 1 << i, 2, H // 2)).transpose(-3, -2).flatten(-4)
    return x
