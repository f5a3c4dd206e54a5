"""Dropout of entries, of whole rows of an update, or of all of it."""

from __future__ import annotations

import torch
from torch import Tensor


def row_mask(rows: int, p: float, p_all: float, rescale: bool, like: Tensor) -> Tensor:
    """A mask (rows,) of ones, in which each is zero with probability p, and all are zero with probability p_all.

    `rescale` divides by the share of ones. Dropping all is a product with zero, not a branch, so that every parameter
    gets a gradient, which distributed training requires, and the function can be traced.
    """
    draws = torch.rand(rows, device=like.device)
    mask = (draws >= p).to(like.dtype)
    if rescale:
        mask = mask / mask.mean().clamp_min(1 / rows)
    keep_any = torch.rand((), device=like.device) >= p_all
    return mask * keep_any


def keep_rows(y: Tensor, p: float) -> Tensor:
    """Stochastic depth: zero each row of the batch with probability p, and scale the others to keep the expectation."""
    ones = (1,) * (y.dim() - 1)
    draws = torch.rand(len(y), *ones, device=y.device)
    keep = (draws >= p).to(y.dtype)
    return y * keep / (1 - p)


def drop_bits(n: int, p: float, device: torch.device) -> Tensor:
    """A dropout mask of n entries in n / 8 bytes (uint8), which keeps each with probability 1 - p, to within 1/65536.

    Each entry takes 16 random bits. Eight results, bytes of 0 or 1, are viewed as one integer, and a multiplication
    gathers their bits in its highest byte.
    """
    n_bytes = -(-n // 8)  # rounded up
    draws = torch.randint(-(2**63), 2**63 - 1, (2 * n_bytes,), dtype=torch.int64, device=device)
    threshold = round(p * 65536) - 32768
    keep = draws.view(torch.int16) >= threshold
    gathered = keep.view(torch.int64) * 0x0102040810204080 >> 56
    return gathered.to(torch.uint8)


def mask_of(bits: Tensor, shape: torch.Size) -> Tensor:
    """Unpack a mask of `drop_bits` to ones and zeros (uint8) of a shape."""
    values = torch.arange(256, dtype=torch.int64, device=bits.device)
    places = torch.arange(8, dtype=torch.int64, device=bits.device)
    unpacked = ((values[:, None] >> places) & 1).to(torch.uint8)  # (256, 8): the eight entries of each byte
    table = unpacked.view(torch.int64).flatten()  # (256,): the eight entries as one integer
    mask = table[bits.int()].view(torch.uint8)
    return mask[: shape.numel()].view(shape)
