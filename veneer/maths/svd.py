"""Singular value decompositions that come out the same each time, so that a file need not hold them."""

from __future__ import annotations

import torch
from torch import Tensor


def fast_svd(W: Tensor, r: int, iterations: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of the r main directions of W: randomised, yet the same for the same weight and seed."""
    with torch.random.fork_rng(devices=[W.device] if W.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return torch.svd_lowrank(W, q=r, niter=iterations)
