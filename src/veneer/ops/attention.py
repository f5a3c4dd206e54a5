"""Attention by sequence: a batch is one row of sequences laid end to end, and none is padded.

    out = [softmax(q_s k_s^T * scale) v_s for s in sequences],  each causal, with its window if it has one

transformers marks such a row by position ids that start again (its DataCollatorWithFlattening) and masks it with a
matrix (tokens, tokens). Under `by_sequence` the mask is the lengths of the sequences instead, and attention goes over
them: through `torch.split`, whose backward is one `cat` (that of a slice fills a tensor of the whole row), and
sequences of one length as one batch. Registered through transformers' attention and mask interfaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from ..upstream import attention as upstream
from . import is_fast

NAME = "veneer_by_sequence"
REPLACED = ("sdpa", "eager")
"""What it stands in for; flash and flex attention know sequences in a row themselves."""
BEYOND = ("s_aux", "position_bias", "cache")
"""What some models hand to attention that is not computed here."""


@contextmanager
def by_sequence(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes attention by sequence for calls with one row and no mask, and as ever for others.

    A training step belongs inside as a whole, since gradient checkpointing calls attention again in the backward pass.
    """
    configs = upstream.configs(model, REPLACED) if is_fast("attention") else []
    if configs:
        upstream.register(NAME, attend, mask_of)
    with upstream.implementation(configs, NAME):
        yield


def is_replaceable(model: nn.Module) -> bool:
    """Whether the model's attention is one that `by_sequence` stands in for."""
    return bool(upstream.configs(model, REPLACED))


def mask_of(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0, **kwargs: Any
) -> Tensor | None:
    """[window or 0, length of each sequence] where the row is of causal sequences; else the mask of "sdpa"."""
    is_whole = batch_size == 1 and q_length == kv_length and q_offset == 0 and kv_offset == 0
    if is_whole and kwargs.get("attention_mask") is None and not kwargs.get("use_vmap"):
        lengths = sequences(kwargs["mask_function"], q_length, kwargs.get("device", "cpu"))
        if lengths is not None:
            return lengths
    kwargs.setdefault("allow_is_causal_skip", True)
    return upstream.sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **kwargs)


def sequences(mask: Callable[..., Tensor], count: int, device: Any) -> Tensor | None:
    """The sequences that a mask function of transformers makes of `count` tokens: [window or 0, lengths ...].

    Asks it about the tokens beside each one, and about the last of the longest sequence. None if it is not causal.
    """
    zero, place = torch.zeros(1, dtype=torch.long, device=device), torch.arange(count, device=device)
    after, before = place[1:], place[:-1]
    goes_on = _ask(mask, zero, after, before)
    starts = [0, *(after[~goes_on]).tolist(), count]
    lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    own = place[starts[longest] : starts[longest + 1]]
    seen = _ask(mask, zero, own[-1:].expand_as(own), own)
    width = int(seen.sum())
    is_window = bool(seen[len(own) - width :].all())
    if not is_window or bool(_ask(mask, zero, before, after).any()):
        return None
    return torch.tensor([0 if width == len(own) else width, *lengths])


def _ask(mask: Callable[..., Tensor], zero: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    zeros = zero.expand_as(q)
    return mask(zeros, zeros, q, kv).expand(q.shape)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query (1, heads, tokens, d), key and value (1, key heads, tokens, d): (1, tokens, heads, d).

    Raises:
        NotImplementedError: the model's attention has more to it.
    """
    if attention_mask is None or attention_mask.dim() != 1:
        more = {**kwargs, **({} if softcap is None else {"softcap": softcap})}
        return upstream.sdpa_attention(module, query, key, value, attention_mask, dropout, scaling, **more)
    unknown = [name for name in BEYOND if kwargs.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)} is not computed by sequence")
    window, *lengths = attention_mask.tolist()
    rows = [t.split(lengths, dim=2) for t in (query, key, value)]
    done: list[Any] = [None] * len(lengths)
    for places in _alike(lengths):
        q, k, v = (row[places[0]] if len(places) == 1 else torch.cat([row[i] for i in places]) for row in rows)
        for i, out in zip(places, _one_length(q, k, v, dropout, scaling, softcap, window).split(1), strict=True):
            done[i] = out
    return torch.cat(done, dim=2).transpose(1, 2).contiguous(), None


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """The places of the sequences of each length."""
    found: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        found.setdefault(length, []).append(place)
    return list(found.values())


def _one_length(q: Tensor, k: Tensor, v: Tensor, p: float, scale: Any, cap: float | None, window: int) -> Tensor:
    """Causal attention of sequences of one length, (n, heads, length, d)."""
    banded = 0 < window < q.shape[2]
    if cap is not None:
        return _capped(q, k, v, p, scale, cap, window if banded else q.shape[2])
    grouped = k.shape[1] != q.shape[1]
    mask = _band(q.shape[2], window, q.device) if banded else None
    if mask is not None and grouped:  # with a mask torch repeats them itself, and not always rightly typed
        k, v, grouped = *(t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v)), False
    return scaled_dot_product_attention(q, k, v, mask, p, is_causal=mask is None, scale=scale, enable_gqa=grouped)


def _capped(q: Tensor, k: Tensor, v: Tensor, p: float, scale: Any, cap: float, window: int) -> Tensor:
    """Attention whose scores are kept within -cap and cap (Gemma 2)."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = torch.tanh(q @ k.transpose(2, 3) * ((q.shape[-1] ** -0.5 if scale is None else scale) / cap)) * cap
    scores = scores.masked_fill(~_band(q.shape[2], window, q.device), -torch.inf)
    return drop(scores.softmax(-1, dtype=torch.float32).to(q.dtype), p) @ v


def _band(length: int, window: int, device: Any) -> Tensor:
    """(length, length): whether the token of a row sees that of a column, among the last `window` up to itself."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window)
