"""The cache of a transformers model: under which name it goes, what earlier calls left in it, a new one.

| release | causal and encoder-decoder models | recurrent models | RWKV, XLNet, Reformer |
|---|---|---|---|
| up to 5.23 | `past_key_values` | `cache_params` | `state`, `mems`, `past_buckets_states` |
| from 5.24 on | `cache`; the old name with a warning | `cache`; the old name with a warning | the same |

A model from outside transformers keeps the name it was written with, whatever release is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import VeneerError
from .calls import parameters

NAMES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
"""Names of a model call's argument, and of an output's field.

`cache` comes first: from 5.24 on an output answers to the old names too, with a warning.
"""


def argument(model: nn.Module) -> str | None:
    """The name under which a model takes its cache; None for a model without one."""
    known = parameters(model)
    return next((name for name in NAMES if name in known), None)


def of_call(kwargs: Mapping[str, Any]) -> Any:
    """The cache that a call brings, under whichever name; None without one."""
    for name in NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return None


def with_cache(kwargs: Mapping[str, Any], name: str | None, cache: Any) -> dict[str, Any]:
    """The arguments of a call with `cache` as its only cache, under a name that `argument` gave.

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
    """The cache that a call returned, whole output or tuple; None without one."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    for name in NAMES:
        cache = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if cache is not None:
            return cache
    return None


def is_filled(cache: Any) -> bool:
    """Whether earlier calls left anything in a cache."""
    if cache is None:
        return False
    if not hasattr(cache, "get_seq_length"):  # lists of tensors: RWKV, XLNet
        return len(cache) > 0
    counted = length(cache)
    return counted is None or counted > 0


def length(cache: Any) -> int | None:
    """The tokens that earlier calls left in a cache; None where it holds something and does not count tokens."""
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        return None if len(cache) > 0 else 0
    layers = getattr(cache, "layers", None)
    if layers is not None and layers and not any(hasattr(layer, "get_seq_length") for layer in layers):
        # recurrent states alone, for which `get_seq_length` raises
        return None if any(_has_state(layer) for layer in layers) else 0
    return int(cache.get_seq_length())


def _has_state(layer: Any) -> bool:
    """Whether a layer's recurrent state holds anything: one flag up to 5.20, a flag for each state later."""
    flags = layer.has_previous_state
    return any(flags.values()) if isinstance(flags, Mapping) else bool(flags)


def is_static(cache: Any) -> bool:
    """Whether a cache has a fixed size, with masks that `generate` makes of that size.

    Recurrent states call themselves compileable too, but have no length that a prompt could not fit into.
    """
    layers = getattr(cache, "layers", None)
    if not layers:
        return bool(getattr(cache, "is_compileable", False))
    return any(hasattr(layer, "get_seq_length") and layer.is_compileable for layer in layers)


def new(model: Any, is_encoder_decoder: bool) -> Any:
    """An empty cache of the kind that the model makes for itself."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache  # torch 2.9 does not trace lazy modules

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return EncoderDecoderCache(cache, DynamicCache()) if is_encoder_decoder else cache


def fill(cache: Any, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Put keys and values, each (batch, heads, n, head_dim), into a cache: a pair for each layer."""
    into = getattr(cache, "self_attention_cache", cache)
    for i, (keys, values) in enumerate(pairs):
        into.update(keys, values, i)


def pairs(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of each layer of a cache, or of a tuple of them."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return [(layer[0], layer[1]) for layer in cache]


def part_of(cache: Any, network: nn.Module, layers_before: int, config: Any) -> Any:
    """A second network's layers of a model's cache, behind the model's: reordered and cut together with them."""
    from transformers.cache_utils import DynamicCache

    if cache is None:
        return None
    if is_static(cache):
        raise VeneerError("a second network cannot lengthen a static cache; generate with the default dynamic one")
    part = DynamicCache(config=config)
    starts = cache.__dict__.setdefault("_veneer_starts", {})
    if id(network) not in starts:
        if is_filled(cache):
            raise VeneerError(
                "the cache was filled without the adapter's own network, which has to see all tokens: give the first "
                "call an empty one, DynamicCache()"
            )
        while len(cache.layers) < layers_before:
            cache.layers.append(cache.layer_class_to_replicate())
        starts[id(network)] = len(cache.layers)
        cache.layers.extend(part.layers)
    start = starts[id(network)]
    part.layers = cache.layers[start : start + len(part.layers)]
    return part
