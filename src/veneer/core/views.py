"""A layer's attributes as PEFT presents them: each is a mapping by adapter name."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import nn

from ..errors import VeneerError


class View(MutableMapping[str, Any]):
    """One attribute of a layer's adapters, by name: `layer.lora_A["default"]`, `layer.scaling["default"] = 2`."""

    def __init__(self, layer: nn.Module, attribute: str) -> None:
        self._layer = layer
        self._attribute = attribute

    def _owner(self, name: str) -> nn.Module:
        if name in self._layer.adapters:
            for part in self._layer.adapters[name].parts:
                if hasattr(part, self._attribute):
                    return part
        raise KeyError(name)

    def __getitem__(self, name: str) -> Any:
        return getattr(self._owner(name), self._attribute)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._owner(name), self._attribute, value)

    def __delitem__(self, name: str) -> None:
        raise VeneerError(f"an attribute of an adapter cannot be deleted; use model.delete_adapter({name!r})")

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __iter__(self) -> Iterator[str]:
        for name, adapter in self._layer.adapters.items():
            if any(hasattr(part, self._attribute) for part in adapter.parts):
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self.items()))
