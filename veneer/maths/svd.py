"""The first singular vectors of a matrix by random projection: the same for the same matrix, on every device.

Halko et al., 2009, arXiv:0909.4061, algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def randomised_svd(W: Tensor, q: int, iterations: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V with W close to U diag(S) V^T, at most q columns each; more iterations bring it closer."""
    if W.shape[0] < W.shape[1]:
        V, S, U = randomised_svd(W.T, q, iterations, seed)
        return U, S, V
    generator = torch.Generator(device="cpu").manual_seed(seed)
    probe = torch.randn(W.shape[1], q, generator=generator, dtype=W.dtype, device="cpu").to(W.device)
    Q = torch.linalg.qr(W @ probe).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(W.T @ Q).Q
        Q = torch.linalg.qr(W @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U, S, Vh.T
