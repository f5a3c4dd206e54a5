"""The cache of a transformers model: its argument name, its content, and how to create and fill one.

| release | causal and encoder-decoder models | recurrent models | RWKV, XLNet, Reformer |
|---|---|---|---|
| up to 5.23 | `past_key_values` | `cache_params` | `state`, `mems`, `past_buckets_states` |
| from 5.24 on | `cache`; the old name with a warning | `cache`; the old name with a warning | the same |

A model that is not part of transformers keeps the name in its own code, whatever release is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import VeneerError
from .calls import parameters

NAMES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
"""The names of the cache as an argument of a model call and as a field of an output.

`cache` comes first, because from 5.24 on, reading an output's cache by its old name gives a warning.
"""


def argument(model: nn.Module) -> str | None:
    """The name of the argument by which a model takes its cache; None if it has no cache."""
    known = parameters(model)
    return next((name for name in NAMES if name in known), None)


def of_call(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, under any name; None if there is none."""
    for name in NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return None


def with_cache(kwargs: Mapping[str, Any], name: str | None, cache: Any) -> dict[str, Any]:
    """The arguments of a call with `cache` as its only cache; `name` is the result of `argument`.

    Raises:
        VeneerError: the model takes no cache.
    """
    if name is None:
        raise VeneerError("the model takes no cache; call it with use_cache=False")
    changed = dict(kwargs)
    for other in NAMES:
        changed.pop(other, None)
    changed[name] = cache
    return changed


def of_output(output: Any) -> Any:
    """The cache in the output of a call, which may be a tuple; None if there is none."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    for name in NAMES:
        cache = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if cache is not None:
            return cache
    return None


def is_filled(cache: Any) -> bool:
    """Whether a cache holds anything from earlier calls."""
    if cache is None:
        return False
    if not hasattr(cache, "get_seq_length"):  # lists of tensors: RWKV, XLNet
        return len(cache) > 0
    count = length(cache)
    return count is None or count > 0


def length(cache: Any) -> int | None:
    """The number of tokens in a cache; None if it is filled but does not count tokens."""
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        return None if len(cache) > 0 else 0
    layers = getattr(cache, "layers", None)
    if layers is not None and layers and not any(hasattr(layer, "get_seq_length") for layer in layers):
        # only recurrent states, for which `get_seq_length` raises
        return None if any(_has_state(layer) for layer in layers) else 0
    return int(cache.get_seq_length())


def _has_state(layer: Any) -> bool:
    """Whether a layer's recurrent state is filled: one flag up to 5.20, one flag per state in later releases."""
    flags = layer.has_previous_state
    return any(flags.values()) if isinstance(flags, Mapping) else bool(flags)


def is_static(cache: Any) -> bool:
    """Whether a cache has a fixed length, for which `generate` also makes its masks.

    Recurrent states are marked as compileable too, but have no length that a prompt could exceed.
    """
    layers = getattr(cache, "layers", None)
    if not layers:
        return bool(getattr(cache, "is_compileable", False))
    return any(hasattr(layer, "get_seq_length") and layer.is_compileable for layer in layers)


def new(model: Any, is_encoder_decoder: bool) -> Any:
    """An empty cache of the kind that the model creates by default."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache  # torch 2.9 does not trace lazy modules

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return EncoderDecoderCache(cache, DynamicCache()) if is_encoder_decoder else cache


WITHOUT_KEYS = ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "moe", "mlp")
"""Kinds of layers, in the `layer_types` of a config, that keep no keys and values."""


class Entry(NamedTuple):
    """The shape of what one layer of a model keeps in the cache for each position."""

    heads: int
    head_dim: int


def config_of(config: Any, layer: int) -> Any:
    """The config of one layer: of a model whose layers have several sizes, some are not to be read off the whole."""
    by_layer = getattr(config, "per_layer_config", None)
    return config if by_layer is None else by_layer[layer]


def entries(config: Any, layers: int, usual: Entry) -> list[Entry | None]:
    """What each layer of a model keeps in the cache; None for layers that keep no keys of their own.

    Gemma 4 has other heads in its layers with full attention. The last layers of Gemma 3n and 4 read the keys of
    earlier ones, and recurrent layers keep a state. Under multi-query attention (Falcon, GPTBigCode), all heads share
    one entry.

    Args:
        config: the config of the text model.
        layers: how many layers the model has.
        usual: the entry of layers for which the config names no other.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    own = layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
    differ = getattr(config, "per_layer_config", None) is not None
    wide = getattr(config, "global_head_dim", None)
    is_grouped = getattr(config, "new_decoder_architecture", False)  # Falcon's, which overrides its multi_query
    if getattr(config, "multi_query", False) and not is_grouped:
        usual = Entry(1, usual.head_dim)
    shapes: list[Entry | None] = []
    for i in range(layers):
        if i >= own or kinds[i] in WITHOUT_KEYS:
            shapes.append(None)
        elif differ:
            layer = config_of(config, i)
            heads = getattr(layer, "num_key_value_heads", None) or usual.heads
            shapes.append(Entry(heads, getattr(layer, "head_dim", None) or usual.head_dim))
        elif wide is not None and kinds[i] == "full_attention":
            heads = getattr(config, "num_global_key_value_heads", None) or usual.heads
            shapes.append(Entry(heads, wide))
        else:
            shapes.append(usual)
    return shapes


def fill(cache: Any, pairs: list[tuple[Tensor, Tensor]], config: Any) -> None:
    """Append keys and values, each (batch, heads, n, head_dim), to a cache: one pair per layer.

    As in PEFT, a layer whose entry is smaller takes the first heads and features, and one without an entry takes none.

    Args:
        config: the config of the text model.
    """
    self_attention = getattr(cache, "self_attention_cache", cache)
    usual = Entry(pairs[0][0].shape[1], pairs[0][0].shape[3])
    for i, entry in enumerate(entries(config, len(pairs), usual)):
        if entry is None:
            continue
        keys, values = pairs[i]
        keys = keys[:, : entry.heads, :, : entry.head_dim]
        values = values[:, : entry.heads, :, : entry.head_dim]
        self_attention.update(keys, values, i)


def pairs(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of each layer in a cache, or in a tuple of such pairs."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return [(layer[0], layer[1]) for layer in cache]


def part_of(cache: Any, network: nn.Module, layers_before: int, config: Any) -> Any:
    """The part of a model's cache that belongs to a second network; its layers follow the model's own.

    Because they are in the same cache, `generate` reorders and crops them together with the model's.
    """
    from transformers.cache_utils import DynamicCache

    if cache is None:
        return None
    if is_static(cache):
        raise VeneerError("a second network cannot extend a static cache; use the default dynamic cache")
    part = DynamicCache(config=config)
    starts = cache.__dict__.setdefault("_veneer_starts", {})
    if id(network) not in starts:
        if is_filled(cache):
            raise VeneerError(
                "the cache was filled without the adapter's own network, which must process all tokens; pass an empty "
                "cache, DynamicCache(), to the first call"
            )
        while len(cache.layers) < layers_before:
            cache.layers.append(cache.layer_class_to_replicate())
        starts[id(network)] = len(cache.layers)
        cache.layers.extend(part.layers)
    start = starts[id(network)]
    part.layers = cache.layers[start : start + len(part.layers)]
    return part


def start_of_part(cache: Any) -> int | None:
    """The index of the first layer that belongs to a second network; None if the cache has only the model's layers."""
    starts = getattr(cache, "_veneer_starts", None)
    return min(starts.values()) if starts else None
