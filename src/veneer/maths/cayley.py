"""Rotations from skew-symmetric matrices: the Cayley transform, exact or by its Neumann series."""

from __future__ import annotations

import torch
from torch import Tensor


def skew(entries: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices (n, size, size) from their entries above the diagonal (n, size (size - 1) / 2)."""
    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    upper = entries.new_zeros(len(entries), size, size).index_put(
        (torch.arange(len(entries), device=entries.device)[:, None], rows, columns), entries
    )
    return upper - upper.transpose(1, 2)


def cayley(Q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1 of skew-symmetric Q (n, size, size): exactly orthogonal."""
    wide = torch.promote_types(Q.dtype, torch.float32)  # no solver works in half precision
    eye = torch.eye(Q.shape[-1], device=Q.device, dtype=wide)
    return torch.linalg.solve(eye + Q.to(wide), eye - Q.to(wide), left=False).to(Q.dtype)


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """The Neumann series of `cayley(-Q)`: I + 2 (Q + Q^2 + ...), `terms` of them.

    As in PEFT's files, the last power has the coefficient 1, and 3 terms are 4.
    """
    R = torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype).expand_as(Q)
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
