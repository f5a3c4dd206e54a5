"""Orthonormal rows from any matrix of full rank."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal(P: Tensor) -> Tensor:
    """(r, n) with r <= n to the orthonormal rows that span the same space, by QR; orthonormal rows stay as they are.

    The signs are those that make R's diagonal positive, so that the result is a smooth function of P.
    """
    Q, R = torch.linalg.qr(P.T.to(torch.promote_types(P.dtype, torch.float32)))
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return (Q * signs).T.to(P.dtype)
