"""Kronecker products: the sizes of their factors, and their product with vectors without forming them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def two_factors(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product of two numbers.

    The first is `factor` if that divides `size`, else the largest divisor up to `factor` and the square root of `size`.
    With -1, only the square root is the limit.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size)
    if factor != -1:
        limit = min(limit, factor)
    for divisor in range(limit, 1, -1):
        if size % divisor == 0:
            return divisor, size // divisor
    return 1, size


def kron_apply(A: Tensor, B: Tensor, x: Tensor) -> Tensor:
    """(A kron B) x for x (..., in): A X B^T, where X is x as a matrix with rows for A and columns for B."""
    X = x.unflatten(-1, (A.shape[1], B.shape[1]))
    XB = torch.einsum("...ij,kj->...ik", X, B)
    AXB = torch.einsum("oi,...ik->...ok", A, XB)
    return AXB.flatten(-2)
