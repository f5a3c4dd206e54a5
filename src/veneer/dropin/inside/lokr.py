"""`peft.tuners.lokr.layer`: the sizes and products of LoKr, which diffusers uses to read files of LyCORIS."""

from __future__ import annotations

import torch
from torch import Tensor

from ...maths.kronecker import two_factors


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is `dimension`, the first one near `factor`, or near the square root if that is -1."""
    return two_factors(dimension, factor)


def make_weight_cp(t: Tensor, wa: Tensor, wb: Tensor) -> Tensor:
    """A convolution's weight from its core (r, r, kernel) and two factors, (r, out) and (r, in)."""
    return torch.einsum("ij...,io,jc->oc...", t, wa, wb)


def make_kron(w1: Tensor, w2: Tensor, scale: float = 1.0) -> Tensor:
    """The Kronecker product of a matrix and a matrix or a convolution's weight, scaled."""
    ones = (1,) * (w2.dim() - w1.dim())
    w1 = w1.reshape(*w1.shape, *ones)
    return torch.kron(w1, w2.contiguous()) * scale
