"""Random matrices that a seed brings back on every machine: drawn on the CPU from a generator of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def kaiming(*shape: int, generator: torch.Generator, a: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Kaiming's uniform values, for a leaky slope a."""
    values = torch.empty(shape, dtype=dtype, device="cpu")
    return nn.init.kaiming_uniform_(values, a=a, generator=generator)


def ternary(*shape: int, generator: torch.Generator, sparsity: float) -> Tensor:
    """-1 and 1, each with probability 1 / (2 sparsity), else 0 (Achlioptas' projections, but for the scale)."""
    draw = torch.rand(shape, generator=generator, device="cpu")
    return (draw > 1 - 1 / (2 * sparsity)).float() - (draw < 1 / (2 * sparsity)).float()
