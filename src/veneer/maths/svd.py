"""Truncated singular value decompositions, exact or randomised, whose random draws are the same on every device.

Halko et al., 2009, arXiv:0909.4061, algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

Svd = tuple[Tensor, Tensor, Tensor]
"""U (out, r), S (r,), Vh (r, in)."""


def principal(W: Tensor, r: int, iterations: int | None = None, seed: int = 0) -> Svd:
    """The r largest singular values of W (out, in) and their vectors, in fp32.

    Args:
        iterations: power iterations of a randomised SVD; None: an exact SVD.
        seed: of the randomised SVD.
    """
    if iterations is not None:
        return randomised_svd(W.float(), r, iterations, seed)
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]


def randomised_svd(W: Tensor, q: int, iterations: int, seed: int = 0, draw: torch.dtype | None = None) -> Svd:
    """An approximation U diag(S) Vh of W of rank q, as by `torch.svd_lowrank` with a seed.

    Args:
        iterations: power iterations; more of them give a better approximation.
        draw: the dtype in which random numbers are drawn, on which their values depend; None: that of W.
    """
    if W.shape[0] < W.shape[1]:
        V, S, Uh = randomised_svd(W.T, q, iterations, seed, draw)
        return Uh.T, S, V.T
    generator = torch.Generator(device="cpu").manual_seed(seed)
    normal = torch.randn(W.shape[1], q, generator=generator, dtype=draw or W.dtype, device="cpu")
    probe = normal.to(W)
    Q = torch.linalg.qr(W @ probe).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(W.T @ Q).Q
        Q = torch.linalg.qr(W @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U, S, Vh


@torch.no_grad()
def first_direction(A: Tensor, B: Tensor) -> Tensor:
    """The first right singular vector (in,) of B A, without forming the product."""
    Q, R = torch.linalg.qr(A.T)
    _, _, Vh = torch.linalg.svd(B @ R.T, full_matrices=False)
    return Q @ Vh[0]


def orthonormal(P: Tensor) -> Tensor:
    """Orthonormal rows (r, n) that span the same space as the rows of P (r, n), r <= n, by QR.

    Rows that are orthonormal already do not change. The signs are those that make R's diagonal positive, so that the
    result is a smooth function of P.
    """
    dtype = torch.promote_types(P.dtype, torch.float32)
    Q, R = torch.linalg.qr(P.T.to(dtype))
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return (Q * signs).T.to(P.dtype)
