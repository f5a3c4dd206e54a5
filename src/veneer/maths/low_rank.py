"""Best low-rank approximations of products and of dense matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .svd import randomised_svd

Pair = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r), the factors of B A."""


def kept(S: Tensor, rank: int | float) -> int:
    """The number of singular values to keep.

    An int is that number; a float is the share of the sum of squares that must be kept.
    """
    if isinstance(rank, int):
        return min(rank, len(S))
    energy = S.double().square().cumsum(0)
    last = int(torch.searchsorted(energy, rank * energy[-1]))
    return min(last + 1, len(S))


def compress(A: Tensor, B: Tensor, rank: int | float) -> Pair:
    """The best approximation of B A of a given rank (or share of energy), without forming the product.

    After a QR decomposition of both factors, the SVD has size r. Each factor gets the square roots of the singular
    values.
    """
    Qa, Ra = torch.linalg.qr(A.T)
    Qb, Rb = torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    return _factors(Qb @ U, S, Vh @ Qa.T, rank)


def truncate(D: Tensor, rank: int | float) -> Pair:
    """The best approximation of a dense D (out, in) of a given rank (or share of energy)."""
    if isinstance(rank, int) and 4 * (rank + 32) < min(D.shape):
        U, S, Vh = randomised_svd(D, rank + 32, iterations=8)  # enough iterations to be exact
    else:
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return _factors(U, S, Vh, rank)


def padded(A: Tensor, B: Tensor, rank: int) -> Pair:
    """The factors padded with zeros to a rank, which leaves their product unchanged."""
    more = rank - A.shape[0]
    padded_A = F.pad(A, (0, 0, 0, more))
    padded_B = F.pad(B, (0, more))
    return padded_A, padded_B


def _factors(U: Tensor, S: Tensor, Vh: Tensor, rank: int | float) -> Pair:
    """The factors of an SVD truncated to a rank (or share of energy)."""
    r = kept(S, rank)
    root = S[:r].sqrt()
    A = root[:, None] * Vh[:r]
    B = U[:, :r] * root
    return A, B


def singular_values(pair: Pair) -> Tensor:
    """The singular values of B A, without forming the product."""
    A, B = pair
    Ra = torch.linalg.qr(A.T, mode="r").R
    Rb = torch.linalg.qr(B, mode="r").R
    return torch.linalg.svdvals(Rb @ Ra.T)


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of the singular values, normalised to sum to one; 0 if all are zero."""
    total = S.sum()
    if float(total) == 0:
        return 0.0
    p = S / total
    entropy = -torch.special.xlogy(p, p).sum()
    return float(torch.exp(entropy))
