"""Masks that leave out whole rows of an update, or all of it."""

from __future__ import annotations

import torch
from torch import Tensor


def row_mask(rows: int, p: float, p_all: float, rescale: bool, like: Tensor) -> Tensor:
    """(rows,) of ones, each zero with probability p and all zero with probability p_all.

    `rescale` divides by the share of rows that stay. A product with zeros, not a branch: every parameter keeps a
    gradient, as distributed training insists, and it traces.
    """
    keep = (torch.rand(rows, device=like.device) >= p).to(like.dtype)
    if rescale:
        keep = keep / keep.mean().clamp_min(1 / rows)
    return keep * (torch.rand((), device=like.device) >= p_all)


def keep_rows(y: Tensor, p: float) -> Tensor:
    """y with each row of the batch zero with probability p, the others scaled to keep the mean (stochastic depth)."""
    keep = (torch.rand(len(y), *(1,) * (y.dim() - 1), device=y.device) >= p).to(y.dtype)
    return y * keep / (1 - p)
