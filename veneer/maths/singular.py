"""Singular vectors without the matrix they are of."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def first_direction(A: Tensor, B: Tensor) -> Tensor:
    """The first right singular vector of B A, which is never formed: what the product reads most, (in,)."""
    Q, R = torch.linalg.qr(A.T)
    v: Tensor = Q @ torch.linalg.svd(B @ R.T, full_matrices=False).Vh[0]
    return v
