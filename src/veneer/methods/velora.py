"""VeLoRA: LoRA that keeps compressed inputs for the backward pass, one number for each group of features.

    dL/dA = (dL/d(A x))^T x~,  x~_g = c (v . x_g) v  for each of n groups x_g of x,  |v| = 1

Miles et al., 2024, arXiv:2405.17991. Trainable: r (in + out) per target. Mergeable; the forward pass is LoRA's. Starts
as a no-op. Only A's gradient is approximate; that of the input is exact, and in evaluation all are. v is the mean group
of the batch ("batch_average"), of the first batch ("batch_average_once"), or "random"; the file holds it.
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
    """n: groups of features; more are more exact and take more memory."""
    scale: float = 1.0
    """c: strength of the inputs made up from the groups."""
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"
    """Where v comes from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "num_groups")
        check_range(self, 1e-12, math.inf, "scale")


def grouped(x: Tensor, n: int) -> Tensor:
    """The features in n groups, the last one filled up with zeros: (..., n, width)."""
    width = -(-x.shape[-1] // n)
    return F.pad(x, (0, n * width - x.shape[-1])).unflatten(-1, (n, width))


def unit(v: Tensor) -> Tensor:
    """v with length one; a zero v becomes a constant one."""
    norm = v.norm()
    return torch.where(norm > 0, v / norm.clamp_min(1e-30), v.numel() ** -0.5)


class Compressed(torch.autograd.Function):
    """x A^T, for whose backward pass x is kept as v . x_g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, v: Tensor, n: int, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(grouped(x, n) @ v, A, v)
        return F.linear(x, A)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, A, v = ctx.saved_tensors
        grad, kept = grad.to(A.dtype), kept.to(A.dtype)  # under autocast they have another
        x = (kept[..., None] * v).flatten(-2)[..., : A.shape[1]] * ctx.scale
        grad_A = grad.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad @ A if ctx.needs_input_grad[0] else None, grad_A, None, None, None


class VeLoRA(LoRA):
    kinds = frozenset({"linear"})
    settings = VeloraConfig

    def __init__(self, config: LoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.how: Any = config.velora_config
        v = torch.zeros(-(-target.in_features // self.how.num_groups))
        self.register_buffer("lora_velora_embed", unit(torch.randn_like(v)) if self.how.init_type == "random" else v)
        self.known = self.how.init_type == "random"

    def update(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().update(x)
        x = x if self.dropout is None else self.dropout(x)
        A, B = self.factors()
        v = self.direction(x.detach())
        return F.linear(Compressed.apply(x, A, v, self.how.num_groups, self.how.scale), B)

    def direction(self, x: Tensor) -> Tensor:
        """v for this batch. A new tensor replaces the old one, which an earlier call's backward pass may need."""
        if not self.known:
            mean = grouped(x, self.how.num_groups).flatten(0, -2).float().mean(0)
            self.lora_velora_embed = unit(mean).to(x.dtype)
            self.known = self.how.init_type == "batch_average_once"
        v: Tensor = self.lora_velora_embed
        return v

    def absorb(self, tensors: Tensors) -> None:
        super().absorb(tensors)
        self.known = self.how.init_type != "batch_average" and bool(self.lora_velora_embed.any())


@dataclass(kw_only=True)
class VeloraLoraConfig(LoraConfig):
    """`LoraConfig(velora_config=VeloraConfig())` under a name of its own."""

    velora_config: Settings | dict[str, Any] | None = field(default_factory=VeloraConfig)
    """`VeloraConfig`: how inputs are compressed."""

    adapter = Composition(VeLoRA)  # type: ignore[assignment]
