"""The higher-order generalised singular value decomposition: a joint decomposition of matrices of one width."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def joint_basis(matrices: Iterable[Tensor], ridge: float) -> Tensor:
    """V (n, n) such that every W_i (m_i, n) equals U_i diag(s_i) V^T, where the columns of U_i have unit length.

    V = R^T E, with [W_1; W_2; ...] = Q R and E the eigenvectors of the mean of (Q_i^T Q_i + ridge I)^-1. If the stack
    has fewer rows than columns, V is its right singular vectors, completed to an orthogonal matrix.
    """
    matrices = list(matrices)
    stack = torch.cat(matrices)
    rows, n = stack.shape
    if rows < n:
        _, _, Vh = torch.linalg.svd(stack, full_matrices=True)
        return Vh.T
    Q, R = torch.linalg.qr(stack)
    shift = ridge * torch.eye(n, dtype=stack.dtype, device=stack.device)
    parts = Q.split([len(W) for W in matrices])
    total = torch.zeros_like(shift)
    for part in parts:
        total = total + torch.linalg.inv(part.T @ part + shift)
    _, E = torch.linalg.eigh(total / len(parts))
    return R.T @ E


def left_vectors(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """U (m, n), whose columns have length one or zero, and s (n,) such that W = U diag(s) V^T."""
    W = W.double().cpu()
    V = V.double().cpu()
    try:
        scaled = torch.linalg.solve(V, W.T).T
    except torch.linalg.LinAlgError:  # correlated weights leave V singular
        scaled = W @ torch.linalg.pinv(V, rtol=1e-6).T
    s = scaled.norm(dim=0)
    inverse = torch.where(s > 1e-12, 1 / s, 0)
    U = scaled * inverse
    return U.float(), s.float()


def off_diagonal(n: int, count: int, generator: torch.Generator) -> Tensor:
    """The rows and columns (2, count) of random places off the diagonal of an (n, n) matrix."""
    places = torch.randperm(n * (n - 1), generator=generator, device="cpu")[:count]
    width = max(n - 1, 1)
    row = places // width
    column = places % width
    column = column + (column >= row)  # skips the diagonal
    return torch.stack([row, column])
