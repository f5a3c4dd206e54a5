"""Best low-rank forms of sums and of dense matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .svd import randomised_svd

Pair = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r), which stand for B A."""


def kept(S: Tensor, rank: int | float) -> int:
    """How many singular values to keep: `rank` itself, or as many as hold that share of the squared values."""
    if isinstance(rank, int):
        return min(rank, len(S))
    energy = S.double().square().cumsum(0)
    return min(int(torch.searchsorted(energy, rank * energy[-1])) + 1, len(S))


def compress(A: Tensor, B: Tensor, rank: int | float) -> Pair:
    """The best approximation of B A of a given rank (or share of energy), without forming the product.

    QR of both factors leaves an SVD of size r; the singular values are dealt to both sides alike.
    """
    Qa, Ra = torch.linalg.qr(A.T)
    Qb, Rb = torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    return _dealt(Qb @ U, S, Vh @ Qa.T, rank)


def truncate(D: Tensor, rank: int | float) -> Pair:
    """The best approximation of a dense D (out, in) of a given rank (or share of energy)."""
    if isinstance(rank, int) and 4 * (rank + 32) < min(D.shape):  # randomised, with enough iterations to be exact
        return _dealt(*randomised_svd(D, rank + 32, iterations=8), rank)
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return _dealt(U, S, Vh, rank)


def padded(A: Tensor, B: Tensor, rank: int) -> Pair:
    """The same product with rows and columns of zeros up to a rank."""
    more = rank - A.shape[0]
    return F.pad(A, (0, 0, 0, more)), F.pad(B, (0, more))


def _dealt(U: Tensor, S: Tensor, Vh: Tensor, rank: int | float) -> Pair:
    r = kept(S, rank)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def singular_values(pair: Pair) -> Tensor:
    """Those of B A, without forming it."""
    Ra, Rb = (torch.linalg.qr(t, mode="r").R for t in (pair[0].T, pair[1]))
    return torch.linalg.svdvals(Rb @ Ra.T)


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of singular values that are normalised to sum to one; 0 where all are zero."""
    total = S.sum()
    if float(total) == 0:
        return 0.0
    p = S / total
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))
