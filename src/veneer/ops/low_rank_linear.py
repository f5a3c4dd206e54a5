"""A linear layer and low-rank updates of it in one autograd function.

    y = x W^T + b + s dropout(x) A^T B^T

The update is added into y in place, and its gradient into x's. Kept for the backward pass: x (which the layers that
read the same input share), x A^T, and a bit for each entry that dropout decides on. Rows may use different pairs A, B:
each run of rows is one slice. Everything is computed in the base's dtype, so that no fp32 copy of an activation
exists; the factors' gradients come back in their own. Dropout's mask is another draw than that of `torch.nn.Dropout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..maths.dropout import drop_bits, mask_of


class Update(NamedTuple):
    """A (r, in), B (out, r), and the probability p with which dropout leaves an entry of their input out."""

    A: Tensor
    B: Tensor
    p: float = 0.0


Run = tuple[int, int, int]
"""Rows from, to, and the number of the update that they get."""


def low_rank_linear(x: Tensor, W: Tensor, b: Tensor | None, updates: Sequence[Update], runs: Sequence[Run]) -> Tensor:
    """x (..., in) through W (out, in) and b; the rows of x, taken as a matrix, get updates by runs."""
    flat = x.reshape(-1, x.shape[-1])
    factors = [factor.to(x.dtype) for update in updates for factor in update[:2]]
    drops = tuple(update.p for update in updates)
    if torch.is_grad_enabled():
        y = LowRankLinear.apply(flat, W, b, tuple(runs), drops, *factors)
    else:
        y = _forward(flat, W, b, runs, drops, factors)[0]
    return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]


class Stack(NamedTuple):
    """Updates one under the other, for a few rows without gradients: A (R, in), B (out, R).

    The mask (rows, R) is one where a rank belongs to a row's own update; None: all do.
    """

    A: Tensor
    B: Tensor
    mask: Tensor | None


FEW = 64
"""Rows up to which it is cheaper to multiply with all updates and mask than to go through runs."""


def stack(updates: Sequence[Update], runs: Sequence[Run], rows: int, dtype: torch.dtype) -> Stack | None:
    """The updates for several calls with the same runs; None where they change between calls or there are many rows."""
    is_one = len(runs) == 1 and runs[0][:2] == (0, rows)
    if any(update.p for update in updates) or not (is_one or rows <= FEW):
        return None
    A, B = torch.cat([u.A for u in updates]).to(dtype), torch.cat([u.B for u in updates], dim=1).to(dtype)
    if is_one:
        return Stack(A, B, None)
    ends = torch.tensor([len(u.A) for u in updates]).cumsum(0).tolist()
    mask = A.new_zeros(rows, len(A))
    for start, stop, i in runs:
        mask[start:stop, ends[i] - len(updates[i].A) : ends[i]] = 1
    return Stack(A, B, mask)


def stacked_linear(x: Tensor, W: Tensor, b: Tensor | None, own: Stack) -> Tensor:
    """What `low_rank_linear` gives for the updates in a stack."""
    flat = x.reshape(-1, x.shape[-1])
    y, h = F.linear(flat, W, b), F.linear(flat, own.A)
    y.addmm_(h if own.mask is None else h.mul_(own.mask), own.B.T)
    return y.view(*x.shape[:-1], y.shape[-1])


def reference(x: Tensor, W: Tensor, b: Tensor | None, updates: Sequence[Update], runs: Sequence[Run]) -> Tensor:
    """The same by plain operations."""
    flat = x.reshape(-1, x.shape[-1])
    y = F.linear(flat, W, b)
    for start, stop, i in runs:
        A, B, p = updates[i]
        rows = torch.arange(start, stop, device=x.device)
        own = F.dropout(flat[rows].to(A.dtype), p)
        y = y.index_add(0, rows, F.linear(F.linear(own, A), B).to(y.dtype))
    return y.view(*x.shape[:-1], -1)


class LowRankLinear(torch.autograd.Function):
    """Factors A0, B0, A1, B1, ... in the dtype of x (rows, in); y (rows, out)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        runs: tuple[Run, ...],
        drops: tuple[float, ...],
        *factors: Tensor,
    ) -> Tensor:
        y, kept = _forward(x, W, b, runs, drops, factors)
        ctx.runs, ctx.drops, ctx.number = runs, drops, len(factors)
        learns_A = any(ctx.needs_input_grad[5::2])
        ctx.save_for_backward(x if learns_A else None, W, *factors, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, W, *rest = ctx.saved_tensors
        factors, kept = rest[: ctx.number], rest[ctx.number :]
        dx = dy @ W if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = [None] * ctx.number
        for n, (start, stop, i) in enumerate(ctx.runs):
            h, bits, A, B = kept[2 * n], kept[2 * n + 1], factors[2 * i], factors[2 * i + 1]
            own, alpha = dy[start:stop], 1 / (1 - ctx.drops[i])
            dh = (own @ B).mul_(alpha)
            mask = None if bits is None else mask_of(bits, torch.Size((stop - start, W.shape[1])))
            if ctx.needs_input_grad[5 + 2 * i]:
                read = x[start:stop] if mask is None else x[start:stop] * mask
                grads[2 * i] = _sum(grads[2 * i], dh.T @ read)
            if ctx.needs_input_grad[6 + 2 * i]:
                grads[2 * i + 1] = _sum(grads[2 * i + 1], (own.T @ h).mul_(alpha))
            if dx is not None and mask is None:
                dx[start:stop].addmm_(dh, A)
            elif dx is not None:
                dx[start:stop] += (dh @ A).mul_(mask)
        return dx, None, None, None, None, *grads


def _forward(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    runs: Sequence[Run],
    drops: Sequence[float],
    factors: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    """y, and for each run x A^T and the bits of dropout's mask."""
    y = F.linear(x, W, b)
    kept: list[Tensor | None] = []
    for start, stop, i in runs:
        A, B, p = factors[2 * i], factors[2 * i + 1], drops[i]
        own, bits = x[start:stop], None
        if p:
            bits = drop_bits(own.numel(), p, x.device)
            own = own * mask_of(bits, own.shape)
        h = own @ A.T
        y[start:stop].addmm_(h, B.T, alpha=1 / (1 - p))
        kept += [h, bits]
    return y, kept


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a.add_(b)
