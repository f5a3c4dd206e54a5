"""VeLoRA: LoRA that saves compressed inputs for the backward pass, one number for each group of features.

    dL/dA = (dL/d(A x))^T x~,  x~_g = c (v . x_g) v  for each of n groups x_g of x,  |v| = 1

Miles et al., 2024, arXiv:2405.17991. Trainable: r (in + out) per target. Mergeable; the forward pass is LoRA's. Starts
as a no-op. Only the gradient of A is approximate; the gradient of the input is exact, and so are all gradients in
evaluation mode. v is the mean group of each batch ("batch_average") or of the first batch ("batch_average_once"), or
random ("random"); the file contains it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapter import Tensors
from ..core.config import check_range
from ..targets.target import Target
from .families.variants import Composition, Settings
from .lora import LoRA, LoraConfig


@dataclass(kw_only=True)
class VeloraConfig(Settings):
    num_groups: int = 64
    """n: number of groups of features. More groups are more accurate and need more memory."""
    scale: float = 1.0
    """c: factor of the reconstructed inputs."""
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"
    """The direction v: the mean group of each batch, of the first batch only, or random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "num_groups")
        check_range(self, 1e-12, math.inf, "scale")


def grouped(x: Tensor, n: int) -> Tensor:
    """The features in n groups, the last one padded with zeros: (..., n, width)."""
    width = group_width(x.shape[-1], n)
    missing = n * width - x.shape[-1]
    padded = F.pad(x, (0, missing))
    return padded.unflatten(-1, (n, width))


def group_width(features: int, n: int) -> int:
    """Features per group when there are n groups, rounded up."""
    return -(-features // n)


def unit(v: Tensor) -> Tensor:
    """v scaled to norm one; a zero vector becomes a constant vector of norm one."""
    norm = v.norm()
    return torch.where(norm > 0, v / norm.clamp_min(1e-30), v.numel() ** -0.5)


class Compressed(torch.autograd.Function):
    """x A^T that saves only v . x_g of each group of x for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, v: Tensor, n: int, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(grouped(x, n) @ v, A, v)
        return F.linear(x, A)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        compressed, A, v = ctx.saved_tensors
        grad = grad.to(A.dtype)  # under autocast, grad and compressed have another dtype
        compressed = compressed.to(A.dtype)
        grad_x = None
        grad_A = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ A
        if ctx.needs_input_grad[1]:
            groups = compressed[..., None] * v  # (..., n, width)
            x = groups.flatten(-2)[..., : A.shape[1]]
            x = x * ctx.scale
            grad_A = grad.flatten(0, -2).T @ x.flatten(0, -2)
        return grad_x, grad_A, None, None, None


class VeLoRA(LoRA):
    kinds = frozenset({"linear"})
    settings = VeloraConfig

    def __init__(self, config: LoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.compression: Any = config.velora_config
        width = group_width(target.in_features, self.compression.num_groups)
        self.has_direction = self.compression.init_type == "random"
        v = unit(torch.randn(width)) if self.has_direction else torch.zeros(width)
        self.register_buffer("lora_velora_embed", v)

    def term(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().term(x)
        if self.dropout is not None:
            x = self.dropout(x)
        A, B = self.factors()
        v = self.direction(x.detach())
        narrow = Compressed.apply(x, A, v, self.compression.num_groups, self.compression.scale)
        return F.linear(narrow, B)

    def direction(self, x: Tensor) -> Tensor:
        """v for this batch. It is a new tensor, because the backward pass of an earlier call may need the old one."""
        if not self.has_direction:
            groups = grouped(x, self.compression.num_groups).flatten(0, -2)
            mean = groups.float().mean(0)
            self.lora_velora_embed = unit(mean).to(x.dtype)
            self.has_direction = self.compression.init_type == "batch_average_once"
        v: Tensor = self.lora_velora_embed
        return v

    def absorb(self, tensors: Tensors) -> None:
        super().absorb(tensors)
        is_fixed = self.compression.init_type != "batch_average"
        self.has_direction = is_fixed and bool(self.lora_velora_embed.any())


@dataclass(kw_only=True)
class VeloraLoraConfig(LoraConfig):
    """Equivalent to `LoraConfig(velora_config=VeloraConfig())`."""

    velora_config: Settings | dict[str, Any] | None = field(default_factory=VeloraConfig)
    """`VeloraConfig`: how inputs are compressed."""

    adapter = Composition(VeLoRA)  # type: ignore[assignment]
