"""Kronecker products: sizes for their factors, and their action on vectors without forming them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def two_factors(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product: of `factor` where it divides, else of its largest divisor up to `factor` and the root.

    -1 sets no limit but the root.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    first = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and (d <= factor or d == 1 or factor == -1))
    return first, size // first


def kron_apply(A: Tensor, B: Tensor, x: Tensor) -> Tensor:
    """(A kron B) x for x (..., in): A X B^T, where X is x with rows for A and columns for B."""
    X = x.unflatten(-1, (A.shape[1], B.shape[1]))
    return torch.einsum("oi,...ik->...ok", A, torch.einsum("...ij,kj->...ik", X, B)).flatten(-2)
