"""Container modules: a `ModuleDict` keyed by adapter names, and the base class of wrappers around base modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import nn


class Modules(nn.ModuleDict):
    """A `ModuleDict` that accepts any string as a key: an adapter may be called "items", "training" or "v1.5"."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Any: ...

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module

    def __delitem__(self, key: str) -> None:
        del self._modules[key]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set `training` directly: torch refuses a value that is not a module if a module has that name."""
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
        """Find unexpected keys here: torch reads the module's name up to the first dot, and ours may contain dots."""
        super()._load_from_state_dict(state_dict, prefix, metadata, False, missing, unexpected, errors)
        if not strict:
            return
        module_prefixes = tuple(f"{prefix}{name}." for name in self._modules)
        for key in state_dict:
            if key.startswith(prefix) and not key.startswith(module_prefixes):
                unexpected.append(key)


class WrapperModule(nn.Module):
    """A module around a module of the base model, which it keeps as `base_layer`."""

    base_layer: nn.Module


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules in evaluation mode inside the block (no dropout), and each part back into its own mode after it."""
    parts = chain.from_iterable(module.modules() for module in modules)
    modes = {part: part.training for part in parts}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, was_training in modes.items():
            part.training = was_training
