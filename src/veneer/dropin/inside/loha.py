"""`peft.tuners.loha.layer`: the products of LoHa, which autograd differentiates."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .lokr import make_weight_cp as from_core


def make_weight(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, scale: Any) -> Tensor:
    """(w1a w1b) * (w2a w2b), scaled."""
    return (w1a @ w1b) * (w2a @ w2b) * scale


def make_weight_cp(t1: Tensor, w1a: Tensor, w1b: Tensor, t2: Tensor, w2a: Tensor, w2b: Tensor, scale: Any) -> Tensor:
    """The product, entry by entry, of two weights of a convolution that a core and two factors give each."""
    return from_core(t1, w1a, w1b) * from_core(t2, w2a, w2b) * scale
