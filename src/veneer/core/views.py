"""PEFT's way of reading a layer: one mapping from adapter names for each attribute."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import nn

from ..errors import VeneerError


class View(MutableMapping[str, Any]):
    """One attribute of a layer's adapters by name: `layer.lora_A["default"]`, `layer.scaling["default"] = 2`."""

    def __init__(self, layer: nn.Module, attribute: str) -> None:
        self._layer, self._attribute = layer, attribute

    def _owner(self, name: str) -> nn.Module:
        for part in self._layer.adapters[name].parts if name in self._layer.adapters else ():
            if hasattr(part, self._attribute):
                return part
        raise KeyError(name)

    def __getitem__(self, name: str) -> Any:
        return getattr(self._owner(name), self._attribute)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._owner(name), self._attribute, value)

    def __delitem__(self, name: str) -> None:
        raise VeneerError(f"delete the adapter with model.delete_adapter({name!r})")

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __iter__(self) -> Iterator[str]:
        return (n for n, a in self._layer.adapters.items() if any(hasattr(p, self._attribute) for p in a.parts))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name!r}: {value!r}' for name, value in self.items())}}}"
