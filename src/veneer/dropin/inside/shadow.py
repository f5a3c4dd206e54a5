"""`peft.tuners.shadow.layers`: the cache of a model with a shadow."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, DynamicCache

from ...upstream import cache as caches


class ShadowCache(DynamicCache):
    """A cache that also holds the entries of a shadow, behind those of the model."""

    is_compileable = False

    @property
    def base(self) -> Cache:
        """The entries of the model."""
        return self._part(slice(0, caches.start_of_part(self)))

    @property
    def shadow(self) -> Cache:
        """The entries of the shadow."""
        return self._part(slice(caches.start_of_part(self), None))

    def _part(self, layers: slice) -> Cache:
        part = DynamicCache()
        part.layers = self.layers[layers]
        return part

    def __len__(self) -> int:
        return len(self.base)


def with_cache(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with an empty cache, in which the shadow can keep its entries too, if none is given."""
    if caches.of_call(kwargs) is not None:
        return kwargs
    return caches.with_cache(kwargs, caches.argument(model), DynamicCache(config=model.config))


def show_cache(output: Any) -> None:
    """Give the cache in a model's output the class that PEFT has for it, if a shadow has entries in it."""
    cache = getattr(output, "past_key_values", None)
    if type(cache) is DynamicCache and caches.start_of_part(cache) is not None:
        cache.__class__ = ShadowCache
