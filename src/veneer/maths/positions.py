"""Where the prompt stands in each row of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def prompts(mask: Tensor, labels: Tensor | None, lengths: Tensor | None) -> Tensor:
    """(rows, 2): first token of each row's prompt and the place after its last, counted from the end of the row.

    Args:
        mask: (rows, length), nonzero where a token is not padding.
        labels: (rows, length); the prompt ends where the first one is not -100, unless nothing is before it.
        lengths: (rows,), the prompt's tokens, where they are known.
    """
    n, real = mask.shape[1], (mask != 0).long()
    start, stop = real.argmax(1), n - real.flip(1).argmax(1)
    if labels is not None:
        supervised = (labels != -100).long()
        first = supervised.argmax(1)
        stop = torch.where((supervised.amax(1) > 0) & (first > start), first, stop)
    if lengths is not None:
        stop = start + lengths
    return torch.stack([start, stop], dim=1) - n


def ends(found: Tensor | None, y: Tensor, p: int | str, s: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The first p (or "all") and the last s places of each prompt in y (rows, length, width).

    For either: indices (rows, places), and whether each is really in the prompt. What is both counts as first.

    Args:
        found: from `prompts`; None: each row is a prompt from end to end.
    """
    n, device = y.shape[1], y.device
    p = n if isinstance(p, str) else p
    found = torch.tensor([[-n, 0]], device=device) if found is None else found.to(device)
    start, stop = (found + n).expand(len(y), 2).split(1, dim=1)
    first = start + torch.arange(p, device=device)
    last = stop - s + torch.arange(s, device=device)
    return (first.clamp(0, n - 1), first < stop), (last.clamp(0, n - 1), last >= start + p)


def within(found: Tensor | None, y: Tensor) -> Tensor:
    """(rows, length): which places of y (rows, length, width) are in the prompt; without `found` the first alone."""
    n = y.shape[1]
    places = torch.arange(n, device=y.device).expand(y.shape[:2])
    if found is None:
        return places < 1
    found = found.to(y.device) + n
    return (places >= found[:, :1]) & (places < found[:, 1:])
