"""The position of the prompt in each row of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def prompts(mask: Tensor, labels: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The start and the end (exclusive) of each row's prompt (rows, 2), counted from the end of the row.

    Args:
        mask: (rows, length), nonzero for tokens that are not padding.
        labels: (rows, length); the prompt ends before the first label that is not -100, unless it would be empty.
        lengths: (rows,), the number of tokens in each prompt, if known.
    """
    n = mask.shape[1]
    is_token = (mask != 0).long()
    start = is_token.argmax(1)
    stop = n - is_token.flip(1).argmax(1)
    if labels is not None:
        supervised = (labels != -100).long()
        first = supervised.argmax(1)
        ends_prompt = (supervised.amax(1) > 0) & (first > start)
        stop = torch.where(ends_prompt, first, stop)
    if lengths is not None:
        stop = start + lengths
    return torch.stack([start, stop], dim=1) - n


def ends(bounds: Tensor | None, y: Tensor, p: int | str, s: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The first p (or "all") and the last s positions of each prompt in y (rows, length, width).

    For each of the two: indices (rows, positions), and whether each is in the prompt. A position that is among both
    counts as one of the first.

    Args:
        bounds: the result of `prompts`; None: each row is a prompt from start to end.
    """
    n = y.shape[1]
    device = y.device
    p = n if isinstance(p, str) else p
    if bounds is None:
        bounds = torch.tensor([[-n, 0]], device=device)
    bounds = (bounds.to(device) + n).expand(len(y), 2)
    start, stop = bounds.split(1, dim=1)
    first = start + torch.arange(p, device=device)
    last = stop - s + torch.arange(s, device=device)
    is_first = first < stop
    is_last = last >= start + p
    first = first.clamp(0, n - 1)
    last = last.clamp(0, n - 1)
    return (first, is_first), (last, is_last)


def within(bounds: Tensor | None, y: Tensor) -> Tensor:
    """Whether each position of y (rows, length, width) is in the prompt: (rows, length).

    If `bounds` is None, the prompt is the first position.
    """
    n = y.shape[1]
    places = torch.arange(n, device=y.device).expand(y.shape[:2])
    if bounds is None:
        return places < 1
    bounds = bounds.to(y.device) + n
    start = bounds[:, :1]
    stop = bounds[:, 1:]
    return (places >= start) & (places < stop)
