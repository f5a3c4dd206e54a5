"""A linear layer with an adapter folded into its weight; the backward pass recomputes the folded weight.

    y = x W'^T + b',  (W', b') = fold(W, b);   dx = dy W',  dW' = dy^T x

This is for adapters whose update is a full matrix (out, in) anyway: one product covers base and update, and no layer
keeps the update, or what it was computed from, until the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import is_autocast, is_fast

Folded = tuple[Tensor, Tensor | None]
"""W', b'."""
Fold = Callable[[Tensor, Tensor | None], Folded]


def suits(x: Tensor, *dtypes: torch.dtype | None) -> bool:
    """Whether to use this path: only in fp32, where the sum W + dW loses no precision, and not while being compiled."""
    if not is_fast("folded_linear") or torch.compiler.is_compiling():
        return False
    is_fp32 = x.dtype == torch.float32 and all(dtype == torch.float32 for dtype in dtypes)
    return is_fp32 and not is_autocast(x.device.type)


def folded_linear(x: Tensor, W: Tensor, b: Tensor | None, fold: Fold, learned: Sequence[Tensor]) -> Tensor:
    """Apply fold(W, b) to x (..., in), with W (out, in); `learned` are the trained parameters that `fold` reads."""
    if not torch.is_grad_enabled():
        return linear(x, *fold(W, b))
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = FoldedLinear.apply(flat, W, b, fold, *learned)
    return y.view(*x.shape[:-1], y.shape[-1])


def reference(x: Tensor, W: Tensor, b: Tensor | None, fold: Fold, learned: Sequence[Tensor]) -> Tensor:
    """`folded_linear` with plain operations."""
    return linear(x, *fold(W, b))


class FoldedLinear(torch.autograd.Function):
    """y (rows, out) = x (rows, in) W'^T + b'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, fold: Fold, *learned: Tensor) -> Tensor:
        ctx.fold = fold
        ctx.learned = learned
        ctx.save_for_backward(x, W, b, *learned)
        return linear(x, *fold(W, b))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W, b, *_ = ctx.saved_tensors  # raises if one of them or of `learned` was changed in place
        with torch.enable_grad():
            folded = ctx.fold(W, b)
        dx = dy @ folded[0].detach() if ctx.needs_input_grad[0] else None
        is_needed = ctx.needs_input_grad[4:]
        leaves = [leaf for leaf, needed in zip(ctx.learned, is_needed, strict=True) if needed]
        grads = iter(_gradients(folded, x, dy, leaves))
        learned = [next(grads) if needed else None for needed in is_needed]
        return dx, None, None, None, *learned


def _gradients(folded: Folded, x: Tensor, dy: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradients of the leaves that `folded` was computed from."""
    W, b = folded
    outputs = []
    grads = []
    if leaves and W.requires_grad:
        outputs.append(W)
        grads.append(dy.T @ x)
    if leaves and b is not None and b.requires_grad:
        outputs.append(b)
        grads.append(dy.sum(0))
    if not outputs:
        return [None] * len(leaves)
    return torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
