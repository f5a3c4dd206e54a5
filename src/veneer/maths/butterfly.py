"""Butterfly products: a dense rotation as a product of a few block-diagonal rotations, with permutations between."""

from __future__ import annotations

import torch
from torch import Tensor


def butterfly(x: Tensor, R: Tensor, inverse: bool = False) -> Tensor:
    """x (..., D H) times M_(n-1) ... M_0 of orthogonal blocks R (n, D, H, H), or times the inverse of that product."""
    if inverse:
        for i in range(len(R)):
            x = _factor(x, R[i].mT, i)
    else:
        for i in reversed(range(len(R))):
            x = _factor(x, R[i], i)
    return x


def _factor(x: Tensor, blocks: Tensor, i: int) -> Tensor:
    """x M_i: within groups of 2^i blocks, each block mixes two half blocks that are 2^i half blocks apart.

    For that, the half blocks of a group are permuted from (2, 2^i) to (2^i, 2), and back afterwards.
    """
    D, H, _ = blocks.shape
    groups = D >> i
    span = 1 << i
    half = H // 2
    if i:
        x = _swapped(x, (groups, 2, span, half))
    x = x.unflatten(-1, (D, H))
    x = torch.einsum("...di,dij->...dj", x, blocks).flatten(-2)
    if i:
        x = _swapped(x, (groups, span, 2, half))
    return x


def _swapped(x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """x with its last dimension seen as `shape`, whose middle two dimensions are swapped."""
    return x.unflatten(-1, shape).transpose(-3, -2).flatten(-4)
