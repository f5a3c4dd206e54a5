"""What training leaves out at random: entries, whole rows of an update, or all of it."""

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


def drop_bits(n: int, p: float, device: torch.device) -> Tensor:
    """A dropout mask of n entries in n / 8 bytes (uint8): each kept with probability 1 - p, to within 1/65536.

    Sixteen random bits decide an entry; eight decisions, bytes of 0 or 1 seen as one integer, are gathered into a byte
    by a product.
    """
    draws = torch.randint(-(2**63), 2**63 - 1, (-(-n // 8) * 2,), dtype=torch.int64, device=device)
    kept = draws.view(torch.int16) >= round(p * 65536) - 32768
    return (kept.view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)


def mask_of(bits: Tensor, shape: torch.Size) -> Tensor:
    """The mask that `drop_bits` made, as ones and zeros (uint8) of a shape."""
    values, places = (torch.arange(n, dtype=torch.int64, device=bits.device) for n in (256, 8))
    table = ((values[:, None] >> places) & 1).to(torch.uint8).view(torch.int64).flatten()
    return table[bits.int()].view(torch.uint8)[: shape.numel()].view(shape)
