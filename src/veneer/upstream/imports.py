"""Changing a module of another library as soon as it is imported.

Importing it only to change it would take seconds, and many programs never use it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

Amend = Callable[[ModuleType], None]


def when_imported(name: str, amend: Amend) -> None:
    """Call `amend` on the module called `name`: at once if it is imported, else right after it is imported."""
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        amend(module)
    elif not any(isinstance(finder, _Finder) and finder.is_for(name, amend) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, amend))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module through the other finders, once, and calls `amend` on it after it is imported."""

    def __init__(self, name: str, amend: Amend) -> None:
        self.name = name
        self.amend = amend

    def is_for(self, name: str, amend: Amend) -> bool:
        return (self.name, self.amend) == (name, amend)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.amend)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, amend: Amend) -> None:
        self.loader = loader
        self.amend = amend

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.amend(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
