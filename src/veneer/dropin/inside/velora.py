"""`peft.tuners.lora.velora`: compressing the inputs that VeLoRA keeps for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...methods.velora import Compressed, grouped, unit


def _reshape_to_grouped_subtokens(x: Tensor, num_groups: int) -> Tensor:
    """All rows of x with their features in groups, (rows, groups, width)."""
    return grouped(x, num_groups).flatten(0, -3)


def _compress_activations(x: Tensor, embed: Tensor, num_groups: int) -> Tensor:
    """One number for each group of features, (rows, groups)."""
    return _reshape_to_grouped_subtokens(x, num_groups) @ embed


def _reconstruct_activations(compressed: Tensor, embed: Tensor, in_features: int, velora_scale: float) -> Tensor:
    """The rows that compressed numbers stand for, (rows, in_features)."""
    groups = compressed[..., None] * embed
    return groups.flatten(-2)[..., :in_features] * velora_scale


def _normalize_projection(embed: Tensor) -> Tensor:
    return unit(embed.float())


class VeloraFunction(torch.autograd.Function):
    """x W^T + b, which keeps the compressed x for the gradient of W."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        embed: Tensor,
        num_groups: int,
        velora_scale: float,
    ) -> Tensor:
        output = Compressed.forward(ctx, input, weight, embed, num_groups, velora_scale)
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_input, grad_weight, *_ = Compressed.backward(ctx, grad_output)
        grad_bias = grad_output.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias, None, None, None
