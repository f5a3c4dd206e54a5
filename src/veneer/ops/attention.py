"""Attention by sequence: a batch is one row of concatenated sequences, without padding.

    out = [softmax(q_s k_s^T * scale) v_s for s in sequences],  each causal, with its sliding window if it has one

transformers recognises such a row by position ids that restart (its DataCollatorWithFlattening) and masks it with a
matrix (tokens, tokens). Under `by_sequence`, the mask is the lengths of the sequences instead, and attention is
computed for each of them. The row is cut with `torch.split`, whose backward pass is one `cat`, whereas that of slices
would fill a tensor of the whole row for each. Sequences of equal length are computed as one batch. The implementation
is registered through transformers' attention and mask interfaces.

A sequence may continue the beginning of the one before it, as the second answer to one prompt does: its tokens attend
to those too, and the beginning is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from ..upstream import attention as upstream
from . import is_fast

NAME = "veneer_by_sequence"
REPLACED = ("sdpa", "eager")
"""Implementations it replaces; flash and flex attention handle sequences in a row themselves."""
UNSUPPORTED = ("s_aux", "position_bias", "cache")
"""Arguments that some models pass to attention and that are not implemented here."""
_continued: ContextVar[Sequence[int]] = ContextVar("continued", default=())
"""`continued` of the `by_sequence` block."""


@contextmanager
def by_sequence(model: nn.Module, continued: Sequence[int] = ()) -> Iterator[None]:
    """Compute attention by sequence inside the block, in calls with one row and no mask; other calls are unaffected.

    The block must contain the whole training step, because gradient checkpointing calls attention again in the
    backward pass.

    Args:
        continued: for each sequence, how many tokens of the one before it are its beginning, as if they were in front
            of it; with those, a sequence must not be longer than the one before it. None of any by default.
    """
    configs = []
    if is_fast("attention"):
        configs = upstream.configs(model, REPLACED)
    if configs:
        upstream.register(NAME, attend, mask_of)
    before = _continued.set(continued)
    try:
        with upstream.implementation(configs, NAME):
            yield
    finally:
        _continued.reset(before)


def is_replaceable(model: nn.Module) -> bool:
    """Whether the model uses an attention implementation that `by_sequence` replaces."""
    return bool(upstream.configs(model, REPLACED))


@torch.no_grad()
def keeps_apart(call: Callable[..., Tensor], first: Tensor, second: Tensor) -> bool:
    """Whether a sequence has the same output alone and after another sequence in the same row, by a trial.

    Args:
        call: returns the output (1, tokens, width) for input_ids (1, tokens) and, optionally, position_ids.
        first: token ids, one-dimensional.
        second: the token ids of the sequence whose output is compared.
    """
    ids = torch.cat([first, second])
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))]).to(ids.device)
    in_row = call(input_ids=ids[None], position_ids=positions[None])[:, len(first) :]
    alone = call(input_ids=second[None])
    tolerance = 1e-4 if alone.dtype == torch.float32 else 1e-2
    largest = float(alone.abs().max())
    return torch.allclose(in_row, alone, rtol=tolerance, atol=tolerance * largest)


# The mask


def mask_of(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0, **kwargs: Any
) -> Tensor | None:
    """[window or 0, length of each sequence] for a row of causal sequences; else the mask of "sdpa"."""
    is_row = batch_size == 1 and q_length == kv_length
    is_whole = is_row and q_offset == 0 and kv_offset == 0
    if is_whole and kwargs.get("attention_mask") is None and not kwargs.get("use_vmap"):
        lengths = sequences(kwargs["mask_function"], q_length, kwargs.get("device", "cpu"))
        if lengths is not None:
            return lengths
    kwargs.setdefault("allow_is_causal_skip", True)
    return upstream.sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **kwargs)


def sequences(mask: Callable[..., Tensor], count: int, device: Any) -> Tensor | None:
    """The sequences that a mask function of transformers makes of `count` tokens: [window or 0, lengths ...].

    Evaluates the mask only between neighbouring tokens, and for the last token of the longest sequence. Returns None if
    the mask is not causal.
    """
    zero = torch.zeros(1, dtype=torch.long, device=device)
    positions = torch.arange(count, device=device)
    before = positions[:-1]
    after = positions[1:]
    continues = _evaluate(mask, zero, after, before)
    starts = [0, *after[~continues].tolist(), count]
    lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    longest = lengths.index(max(lengths))
    longest_positions = positions[starts[longest] : starts[longest + 1]]
    last_position = longest_positions[-1:].expand_as(longest_positions)
    visible = _evaluate(mask, zero, last_position, longest_positions)
    width = int(visible.sum())
    is_window = bool(visible[len(longest_positions) - width :].all())
    if not is_window:
        return None
    sees_ahead = _evaluate(mask, zero, before, after)
    if bool(sees_ahead.any()):
        return None
    window = 0 if width == len(longest_positions) else width
    return torch.tensor([window, *lengths])


def _evaluate(mask: Callable[..., Tensor], zero: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """Whether each position in `q` sees the position in `kv` at the same index."""
    zeros = zero.expand_as(q)
    return mask(zeros, zeros, q, kv).expand(q.shape)


# The product


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
        NotImplementedError: the model's attention takes arguments that are not implemented here.
    """
    if attention_mask is None or attention_mask.dim() != 1:
        if softcap is not None:
            kwargs["softcap"] = softcap
        return upstream.sdpa_attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    unsupported = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if unsupported:
        raise NotImplementedError(f"attention with {', '.join(unsupported)} is not computed by sequence")
    window, *lengths = attention_mask.tolist()
    continued = _continued.get() or [0] * len(lengths)
    q_parts = query.split(lengths, dim=2)
    k_parts = _with_beginnings(key.split(lengths, dim=2), continued)
    v_parts = _with_beginnings(value.split(lengths, dim=2), continued)
    outputs: list[Any] = [None] * len(lengths)
    for indices in _by_length(list(zip(lengths, continued, strict=True))):
        q = _batch(q_parts, indices)
        k = _batch(k_parts, indices)
        v = _batch(v_parts, indices)
        out = _one_length(q, k, v, dropout, scaling, softcap, window)
        for index, sequence in zip(indices, out.split(1), strict=True):
            outputs[index] = sequence
    row = torch.cat(outputs, dim=2)
    return row.transpose(1, 2).contiguous(), None


def _with_beginnings(parts: Sequence[Tensor], continued: Sequence[int]) -> list[Tensor]:
    """The sequences' keys or values (1, heads, length, d), with those of the tokens that they continue."""
    whole = list(parts)
    for i, count in enumerate(continued):
        if count:
            beginning = parts[i - 1].narrow(2, 0, count)
            whole[i] = torch.cat([beginning, parts[i]], dim=2)
    return whole


def _by_length(lengths: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The indices of the sequences, grouped by their length and the number of tokens that they continue."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    return list(groups.values())


def _batch(parts: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    """The sequences at `indices`, which have one length, as one tensor (n, heads, length, d)."""
    if len(indices) == 1:
        return parts[indices[0]]
    return torch.cat([parts[index] for index in indices])


def _one_length(q: Tensor, k: Tensor, v: Tensor, p: float, scale: Any, cap: float | None, window: int) -> Tensor:
    """Causal attention of sequences of one length.

    Args:
        q: (n, heads, length, d).
        k, v: (n, key heads, length with the beginning that the sequences continue, d).
    """
    length = k.shape[2]
    is_banded = 0 < window < length
    if cap is not None:
        return _capped(q, k, v, p, scale, cap, window if is_banded else length)
    is_grouped = k.shape[1] != q.shape[1]
    if not is_banded and q.shape[2] == length:
        return scaled_dot_product_attention(q, k, v, None, p, is_causal=True, scale=scale, enable_gqa=is_grouped)
    mask = _band(q.shape[2], length, window if is_banded else length, q.device)
    if is_grouped:  # with a mask, torch would repeat the heads itself, and sometimes in the wrong dtype
        k = _repeat_heads(k, q)
        v = _repeat_heads(v, q)
    return scaled_dot_product_attention(q, k, v, mask, p, is_causal=False, scale=scale, enable_gqa=False)


def _capped(q: Tensor, k: Tensor, v: Tensor, p: float, scale: Any, cap: float, window: int) -> Tensor:
    """Attention whose scores are soft-capped to (-cap, cap), as in Gemma 2."""
    k = _repeat_heads(k, q)
    v = _repeat_heads(v, q)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    scores = q @ k.transpose(2, 3)
    scores = torch.tanh(scores * (scale / cap)) * cap
    visible = _band(q.shape[2], k.shape[2], window, q.device)
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32)
    return drop(weights.to(q.dtype), p) @ v


def _repeat_heads(t: Tensor, q: Tensor) -> Tensor:
    """Keys or values repeated to the number of heads of the query."""
    repeats = q.shape[1] // t.shape[1]
    return t.repeat_interleave(repeats, 1)


def _band(rows: int, columns: int, window: int, device: Any) -> Tensor:
    """(rows, columns): True where the row's token sees the column's, among the last `window` up to itself.

    The rows are the last of the columns.
    """
    ahead = columns - rows
    visible = torch.ones(rows, columns, dtype=torch.bool, device=device).tril(ahead)
    return visible.triu(ahead + 1 - window)
