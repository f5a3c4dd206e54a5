"""Random matrices that a seed reproduces on every machine: drawn on the CPU from their own generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def kaiming(*shape: int, generator: torch.Generator, a: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Kaiming uniform values, for a leaky ReLU of slope a."""
    values = torch.empty(shape, dtype=dtype, device="cpu")
    return nn.init.kaiming_uniform_(values, a=a, generator=generator)


def ternary(*shape: int, generator: torch.Generator, sparsity: float) -> Tensor:
    """-1 and 1, each with probability 1 / (2 sparsity), else 0: Achlioptas' random projections without their scale."""
    draw = torch.rand(shape, generator=generator, device="cpu")
    p = 1 / (2 * sparsity)
    positive = draw > 1 - p
    negative = draw < p
    return positive.float() - negative.float()
