"""Matrices of one width decomposed together: the higher-order generalised singular value decomposition."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def joint_basis(matrices: Iterable[Tensor], ridge: float) -> Tensor:
    """V (n, n) such that every W_i (m_i, n) is U_i diag(s_i) V^T with columns of length one in U_i.

    V = R^T E for [W_1; W_2; ...] = Q R, E the eigenvectors of the mean of (Q_i^T Q_i + ridge I)^-1. Where the stack has
    fewer rows than columns, its right singular vectors, completed to an orthogonal matrix.
    """
    matrices = list(matrices)
    stack = torch.cat(matrices)
    rows, n = stack.shape
    if rows < n:
        return torch.linalg.svd(stack, full_matrices=True)[2].T
    Q, R = torch.linalg.qr(stack)
    shift = ridge * torch.eye(n, dtype=stack.dtype, device=stack.device)
    parts = Q.split([len(W) for W in matrices])
    mean = sum(torch.linalg.inv(part.T @ part + shift) for part in parts) / len(parts)
    return R.T @ torch.linalg.eigh(mean)[1]


def left_vectors(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """U (m, n), its columns of length one or zero, and their former lengths s (n,): W = U diag(s) V^T."""
    W, V = W.double().cpu(), V.double().cpu()
    try:
        scaled = torch.linalg.solve(V, W.T).T
    except torch.linalg.LinAlgError:  # correlated weights leave V singular
        scaled = W @ torch.linalg.pinv(V, rtol=1e-6).T
    s = scaled.norm(dim=0)
    return (scaled * torch.where(s > 1e-12, 1 / s, 0)).float(), s.float()


def off_diagonal(n: int, count: int, generator: torch.Generator) -> Tensor:
    """Random places (2, count) off the diagonal of an (n, n) matrix: rows and columns."""
    drawn = torch.randperm(n * (n - 1), generator=generator, device="cpu")[:count]
    row, column = drawn // max(n - 1, 1), drawn % max(n - 1, 1)
    return torch.stack([row, column + (column >= row)])
