"""Rotations from skew-symmetric matrices: the Cayley transform, exact or by a truncated Neumann series."""

from __future__ import annotations

import torch
from torch import Tensor


def skew(entries: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices (n, size, size) from their entries above the diagonal (n, size (size - 1) / 2)."""
    n = len(entries)
    matrices = torch.arange(n, device=entries.device)[:, None]
    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    zeros = entries.new_zeros(n, size, size)
    upper = zeros.index_put((matrices, rows, columns), entries)
    return upper - upper.transpose(1, 2)


def cayley(Q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1 for skew-symmetric Q (n, size, size): orthogonal matrices."""
    dtype = torch.promote_types(Q.dtype, torch.float32)  # no solver works in half precision
    wide = Q.to(dtype)
    eye = torch.eye(Q.shape[-1], device=Q.device, dtype=dtype)
    rotations = torch.linalg.solve(eye + wide, eye - wide, left=False)
    return rotations.to(Q.dtype)


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """The first `terms` terms of the Neumann series of `cayley(-Q)`, which is I + 2 (Q + Q^2 + ...).

    As PEFT computes it: the coefficient of the last power is 1, and `terms=3` gives 4 terms.
    """
    eye = torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype)
    R = eye.expand_as(Q)
    if terms == 2:
        return R + 2 * Q
    power = Q
    if terms > 2:
        R = R + 2 * Q
        for _ in range(2, max(3, terms - 1)):
            power = power @ Q
            R = R + 2 * power
        R = R + power @ Q
    return R
