"""A linear layer and low-rank updates of it in one autograd function.

    y = x W^T + b + s dropout(x) A^T B^T

The update comes first, and x W^T is added into it by the product that computes it. In half precision, that product sums
in fp32 and rounds once; the other way round, x W^T is rounded first, and what an update adds to it is mostly below half
a unit in the last place: it is rounded away, always in the same direction. The gradient of x is computed in the same
order.

Kept for the backward pass: x (which the layers that read the same input share), x A^T, and one bit for each entry that
dropout decides on. Rows may use different pairs A, B: each run of rows is one slice. Everything is computed in the
base's dtype, so that no fp32 copy of an activation exists; the gradients of the factors have the factors' dtype. The
dropout mask is drawn differently from that of `torch.nn.Dropout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from ..maths.dropout import drop_bits, mask_of


class Update(NamedTuple):
    """A (r, in), B (out, r), and the probability p with which dropout zeroes an entry of the input."""

    A: Tensor
    B: Tensor
    p: float = 0.0


Run = tuple[int, int, int]
"""(first row, end, index of the update that these rows use)."""


def low_rank_linear(x: Tensor, W: Tensor, b: Tensor | None, updates: Sequence[Update], runs: Sequence[Run]) -> Tensor:
    """x W^T + b for x (..., in) and W (out, in), plus the updates for runs of rows of x, viewed as a matrix."""
    flat = x.reshape(-1, x.shape[-1])
    factors = []
    for update in updates:
        factors.append(update.A.to(x.dtype))
        factors.append(update.B.to(x.dtype))
    drops = tuple(update.p for update in updates)
    if torch.is_grad_enabled():
        y = LowRankLinear.apply(flat, W, b, tuple(runs), drops, *factors)
    else:
        y, _ = _forward(flat, W, b, runs, drops, factors)
    return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]


class Stack(NamedTuple):
    """Updates stacked to one pair, for a few rows without gradients: A (R, in), B (out, R).

    The mask (rows, R) is one where a rank belongs to a row's own update; None if all ranks belong to all rows.
    """

    A: Tensor
    B: Tensor
    mask: Tensor | None


FEW = 64
"""Up to this many rows it is cheaper to multiply with all updates and mask than to go through the runs."""


def stack(updates: Sequence[Update], runs: Sequence[Run], rows: int, dtype: torch.dtype) -> Stack | None:
    """Stack the updates, for several calls with the same runs; None if there is dropout, or there are many rows."""
    is_one_run = len(runs) == 1 and runs[0][:2] == (0, rows)
    has_dropout = any(update.p for update in updates)
    if has_dropout or not (is_one_run or rows <= FEW):
        return None
    A = torch.cat([update.A for update in updates]).to(dtype)
    B = torch.cat([update.B for update in updates], dim=1).to(dtype)
    if is_one_run:
        return Stack(A, B, None)
    ranks = [len(update.A) for update in updates]
    ends = torch.tensor(ranks).cumsum(0).tolist()
    mask = A.new_zeros(rows, len(A))
    for start, stop, i in runs:
        mask[start:stop, ends[i] - ranks[i] : ends[i]] = 1
    return Stack(A, B, mask)


def stacked_linear(x: Tensor, W: Tensor, b: Tensor | None, stacked: Stack) -> Tensor:
    """The result of `low_rank_linear` for the updates in a stack."""
    flat = x.reshape(-1, x.shape[-1])
    h = linear(flat, stacked.A)
    if stacked.mask is not None:
        h.mul_(stacked.mask)
    y = _add_base(h @ stacked.B.T, flat, W, b)
    return y.view(*x.shape[:-1], y.shape[-1])


def with_base(update: Tensor, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """update (..., out) + x W^T + b for x (..., in); in half precision, one rounding of update plus x W^T."""
    flat = x.reshape(-1, x.shape[-1])
    y = torch.addmm(update.reshape(-1, update.shape[-1]), flat, W.T)
    if b is not None:
        y = y + b
    return y.view(update.shape)


def _add_base(update: Tensor, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """update + x W^T + b, in the memory of `update`."""
    y = update.addmm_(x, W.T)
    return y if b is None else y.add_(b)


def reference(x: Tensor, W: Tensor, b: Tensor | None, updates: Sequence[Update], runs: Sequence[Run]) -> Tensor:
    """`low_rank_linear` with plain operations."""
    flat = x.reshape(-1, x.shape[-1])
    y = linear(flat, W, b)
    for start, stop, i in runs:
        A, B, p = updates[i]
        rows = torch.arange(start, stop, device=x.device)
        dropped = dropout(flat[rows].to(A.dtype), p)
        update = linear(linear(dropped, A), B)
        y = y.index_add(0, rows, update.to(y.dtype))
    return y.view(*x.shape[:-1], -1)


class LowRankLinear(torch.autograd.Function):
    """`low_rank_linear` for x (rows, in) and factors A0, B0, A1, B1, ... in the dtype of x; returns y (rows, out)."""

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
        ctx.runs = runs
        ctx.drops = drops
        ctx.number = len(factors)
        learns_A = any(ctx.needs_input_grad[5::2])
        ctx.save_for_backward(x if learns_A else None, W, *factors, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, W, *rest = ctx.saved_tensors
        factors = rest[: ctx.number]
        kept = rest[ctx.number :]
        is_needed = ctx.needs_input_grad[5:]  # for each factor
        dx = _room(ctx.runs, dy, W.shape[1]) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = [None] * ctx.number
        for n, (start, stop, i) in enumerate(ctx.runs):
            at_A = 2 * i  # its index among the factors
            at_B = at_A + 1
            h = kept[2 * n]
            bits = kept[2 * n + 1]
            dy_run = dy[start:stop]
            alpha = 1 / (1 - ctx.drops[i])
            dh = (dy_run @ factors[at_B]).mul_(alpha)
            mask = None
            if bits is not None:
                mask = mask_of(bits, torch.Size((stop - start, W.shape[1])))
            if is_needed[at_A]:
                x_run = x[start:stop] if mask is None else x[start:stop] * mask
                grads[at_A] = _sum(grads[at_A], dh.T @ x_run)
            if is_needed[at_B]:
                dB = (dy_run.T @ h).mul_(alpha)
                grads[at_B] = _sum(grads[at_B], dB)
            if dx is None:
                continue
            torch.mm(dh, factors[at_A], out=dx[start:stop])
            if mask is not None:
                dx[start:stop].mul_(mask)
        if dx is not None:
            dx.addmm_(dy, W)
        return dx, None, None, None, None, *grads


def _forward(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    runs: Sequence[Run],
    drops: Sequence[float],
    factors: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    """y, and for each run x A^T and the bits of the dropout mask."""
    update = _room(runs, x, W.shape[0])
    kept: list[Tensor | None] = []
    for start, stop, i in runs:
        A = factors[2 * i]
        B = factors[2 * i + 1]
        p = drops[i]
        x_run = x[start:stop]
        bits = None
        if p:
            bits = drop_bits(x_run.numel(), p, x.device)
            x_run = x_run * mask_of(bits, x_run.shape)
        h = x_run @ A.T
        torch.mm(h, B.T, out=update[start:stop])
        if p:
            update[start:stop].mul_(1 / (1 - p))
        kept.append(h)
        kept.append(bits)
    return _add_base(update, x, W, b), kept


def _room(runs: Sequence[Run], like: Tensor, width: int) -> Tensor:
    """Memory (rows, width) for the updates of all runs: zero in the rows of none."""
    rows = len(like)
    if sum(stop - start for start, stop, _ in runs) == rows:
        return like.new_empty(rows, width)
    return like.new_zeros(rows, width)


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a.add_(b)
