"""The key-value caches of several sequences as one batch, aligned at their ends.

A sequence that joins or leaves makes a new batch cache; between such changes, the cache grows as in `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..upstream import cache as caches


class Piece(NamedTuple):
    """The cache of one sequence: a row of a cache, of which only the last `length` positions are its own."""

    cache: Any
    row: int
    length: int


def can_share(model: Any) -> bool:
    """Whether the sequences of a model can be batched: its layers keep keys and values and no other state."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if caches.argument(model) is None:
        return False
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    has_state = any(kind in caches.WITHOUT_KEYS for kind in getattr(config, "layer_types", None) or ())
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return not has_state and all(type(layer) in kinds for layer in layers)


def joined(model: Any, pieces: Sequence[Piece]) -> Any:
    """One cache whose rows are the pieces, padded with zeros on the left to the longest of them."""
    width = max(piece.length for piece in pieces)
    cache = caches.new(model, is_encoder_decoder=False)
    by_piece = [caches.pairs(piece.cache) for piece in pieces]
    for number, pairs in enumerate(zip(*by_piece, strict=True)):
        keys, values = zip(*pairs, strict=True)
        if keys[0] is None:  # a layer that reads the keys of another one
            continue
        cache.update(_aligned(keys, pieces), _aligned(values, pieces), number)
        layer = cache.layers[number]
        if layer.is_sliding:
            layer.cumulative_length = width  # also the positions that have left the window
    return cache


def _aligned(tensors: Sequence[Tensor], pieces: Sequence[Piece]) -> Tensor:
    """Each piece's own positions of its tensor (rows, heads, positions, head_dim), as long as the longest of them."""
    counts = [min(piece.length, tensor.shape[2]) for piece, tensor in zip(pieces, tensors, strict=True)]
    width = max(counts)
    first = tensors[0]
    batch = first.new_zeros(len(pieces), first.shape[1], width, first.shape[3])
    for place, (tensor, piece, count) in enumerate(zip(tensors, pieces, counts, strict=True)):
        batch[place, :, width - count :] = tensor[piece.row, :, tensor.shape[2] - count :]
    return batch


def mask_of(lengths: Sequence[int], width: int, device: Any) -> Tensor | None:
    """The attention mask (rows, width) of sequences that end together; None if none of them is padded."""
    if min(lengths) == width:
        return None
    starts = torch.tensor([width - length for length in lengths], device=device)
    return (torch.arange(width, device=device) >= starts[:, None]).long()


def bytes_per_position(model: Any) -> int:
    """The memory that one position of one sequence takes in the cache."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "hidden_size", None) or 1
    head_dim = getattr(config, "head_dim", None) or width // (getattr(config, "num_attention_heads", None) or 1)
    layers = getattr(config, "num_hidden_layers", None) or 1
    elements = 0
    for entry in caches.entries(config, layers, caches.Entry(heads, head_dim)):
        if entry is not None:
            elements += 2 * entry.heads * entry.head_dim
    return max(1, elements) * model.get_input_embeddings().weight.element_size()
