"""A linear layer through the weight that an adapter folds into, which is made again for the backward pass.

    y = x W'^T + b',  (W', b') = fold(W, b);   dx = dy W',  dW' = dy^T x

For updates that are a whole matrix (out, in) anyway: the product with the base weight and that with the update are one,
and no layer keeps its update, or what it was made of, until the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import is_autocast, is_fast

Fold = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def suits(x: Tensor, *dtypes: torch.dtype | None) -> bool:
    """Whether to go this way: in fp32 alone, where a weight loses nothing to the sum, and not while being compiled."""
    is_wide = all(dtype == torch.float32 for dtype in (x.dtype, *dtypes)) and not is_autocast(x.device.type)
    return is_wide and is_fast("folded_linear") and not torch.compiler.is_compiling()


def folded_linear(x: Tensor, W: Tensor, b: Tensor | None, fold: Fold, learned: Sequence[Tensor]) -> Tensor:
    """x (..., in) through fold(W, b), W (out, in); `learned` are the leaves that `fold` reads and training changes."""
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = FoldedLinear.apply(flat, W, b, fold, *learned) if torch.is_grad_enabled() else F.linear(x, *fold(W, b))
    return y.view(*x.shape[:-1], y.shape[-1])


def reference(x: Tensor, W: Tensor, b: Tensor | None, fold: Fold, learned: Sequence[Tensor]) -> Tensor:
    """The same, the plain way."""
    return F.linear(x, *fold(W, b))


class FoldedLinear(torch.autograd.Function):
    """x (rows, in); y (rows, out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, fold: Fold, *learned: Tensor) -> Tensor:
        ctx.fold, ctx.learned = fold, learned
        ctx.save_for_backward(x, W, b, *learned)
        return F.linear(x, *fold(W, b))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W, b, *_ = ctx.saved_tensors  # reading them tells whether one was changed since
        with torch.enable_grad():
            new = ctx.fold(W, b)
        dx = dy @ new[0].detach() if ctx.needs_input_grad[0] else None
        grads = iter(_of_learned(ctx, new, x, dy))
        return dx, None, None, None, *(next(grads) if needed else None for needed in ctx.needs_input_grad[4:])


def _of_learned(ctx: Any, new: tuple[Tensor, Tensor | None], x: Tensor, dy: Tensor) -> Sequence[Tensor | None]:
    """The gradients of those leaves that need one."""
    leaves = [leaf for leaf, needed in zip(ctx.learned, ctx.needs_input_grad[4:], strict=True) if needed]
    made = [(t, grad) for t, grad in zip(new, (lambda: dy.T @ x, lambda: dy.sum(0)), strict=True) if _learns(t)]
    if not (leaves and made):
        return [None] * len(leaves)
    outputs, grads = zip(*((t, grad()) for t, grad in made), strict=True)
    return torch.autograd.grad(outputs, leaves, grads, allow_unused=True)


def _learns(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad
