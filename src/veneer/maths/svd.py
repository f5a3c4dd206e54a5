"""The principal part of a matrix by its singular values, the same for the same matrix on every device.

Halko et al., 2009, arXiv:0909.4061, algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

Svd = tuple[Tensor, Tensor, Tensor]
"""U (out, r), S (r,), Vh (r, in)."""


def principal(W: Tensor, r: int, iterations: int | None = None, seed: int = 0) -> Svd:
    """The r largest singular values of W (out, in) and their vectors, in fp32: exact, or randomised."""
    if iterations is not None:
        return randomised_svd(W.float(), r, iterations, seed)
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]


def randomised_svd(W: Tensor, q: int, iterations: int, seed: int = 0, draw: torch.dtype | None = None) -> Svd:
    """W close to U diag(S) Vh, of rank q; more iterations bring it closer. As `torch.svd_lowrank` does from a seed.

    Args:
        draw: the dtype in which random numbers are drawn, which gives others; None: that of W.
    """
    if W.shape[0] < W.shape[1]:
        V, S, Uh = randomised_svd(W.T, q, iterations, seed, draw)
        return Uh.T, S, V.T
    generator = torch.Generator(device="cpu").manual_seed(seed)
    probe = torch.randn(W.shape[1], q, generator=generator, dtype=draw or W.dtype, device="cpu").to(W)
    Q = torch.linalg.qr(W @ probe).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(W.T @ Q).Q
        Q = torch.linalg.qr(W @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U, S, Vh


@torch.no_grad()
def first_direction(A: Tensor, B: Tensor) -> Tensor:
    """The first right singular vector of B A, which is never formed: what the product reads most, (in,)."""
    Q, R = torch.linalg.qr(A.T)
    v: Tensor = Q @ torch.linalg.svd(B @ R.T, full_matrices=False).Vh[0]
    return v


def orthonormal(P: Tensor) -> Tensor:
    """(r, n) with r <= n to the orthonormal rows that span the same space, by QR; orthonormal rows stay as they are.

    The signs are those that make R's diagonal positive, so that the result is a smooth function of P.
    """
    Q, R = torch.linalg.qr(P.T.to(torch.promote_types(P.dtype, torch.float32)))
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return (Q * signs).T.to(P.dtype)
