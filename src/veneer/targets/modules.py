"""Modules of our own that hold others: by the names of adapters, or around one of the base model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn


class Modules(nn.ModuleDict):
    """A `ModuleDict` that takes any string as a key: adapters may be called "items", "training" or "v1.5"."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Any: ...

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module

    def __delitem__(self, key: str) -> None:
        del self._modules[key]

    def __setattr__(self, name: str, value: Any) -> None:
        """torch refuses values that are no modules under the name of one."""
        if name == "training":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._modules[name] = module  # type: ignore[assignment]

    def get(self, key: str, default: Any = None) -> Any:
        return self._modules.get(key, default)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        """torch takes a key up to its first dot for the name of a module."""
        super()._load_from_state_dict(state_dict, prefix, metadata, False, missing, unexpected, errors)
        own = tuple(f"{prefix}{name}." for name in self._modules)
        unexpected += [key for key in state_dict if strict and key.startswith(prefix) and not key.startswith(own)]


class WrapperModule(nn.Module):
    """A module around one of the base model, which it keeps as `base_layer`."""

    base_layer: nn.Module


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Inside, what training does at random is left out."""
    before = [(module, module.training) for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, was in before:
            module.train(was)
