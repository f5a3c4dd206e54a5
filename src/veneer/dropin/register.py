"""Installing the drop-in: PEFT's modules in `sys.modules`, and a distribution that says which PEFT is installed."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import sys
from types import ModuleType
from typing import Any

from ..errors import VeneerError
from ..upstream.peft import accept
from .absent import placeholder, reason_for
from .tables import methods as table
from .tables import names

MARK = "_veneer_drop_in"
"""An attribute of the drop-in's modules, which the real PEFT lacks."""
PROBES = ("is_peft_available", "is_peft_greater_or_equal")
"""Cached functions with which other libraries look for PEFT."""


def install(strict: bool) -> None:
    """Make `import peft` import the drop-in.

    Raises:
        VeneerError: the real PEFT is already imported, and other modules may hold references to it.
    """
    from .strict import set_strict

    present = sys.modules.get("peft")
    if present is not None and not hasattr(present, MARK):
        raise VeneerError(
            "the real peft is imported already; call veneer.install_as_peft() at the start of the program, before "
            "peft, transformers.trainer, trl and diffusers are imported"
        )
    set_strict(strict)
    if present is None:
        sys.meta_path.insert(0, Distributions())
        sys.modules.update(modules())
        _forget_probes()
        accept(table.VERSION)


def _forget_probes() -> None:
    """Make transformers and other libraries, which cache whether PEFT is installed, look for it again."""
    for name, module in list(sys.modules.items()):
        library = name.split(".")[0]
        if library not in ("transformers", "accelerate", "diffusers", "trl"):
            continue
        for probe in PROBES:
            function = vars(module).get(probe)
            if hasattr(function, "cache_clear"):
                function.cache_clear()
        if "_peft_available" in vars(module):
            module._peft_available = True  # type: ignore[attr-defined]


class Distributions(importlib.metadata.DistributionFinder):
    """Finds the drop-in's modules and its distribution `peft`."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.split(".")[0] != "peft":
            return None
        module = sys.modules.get(fullname)
        return None if module is None else module.__spec__

    def find_distributions(self, context: Any = importlib.metadata.DistributionFinder.Context()) -> Any:  # noqa: B008
        if context.name in (None, "peft", "Peft", "PEFT"):
            yield Distribution()


class Distribution(importlib.metadata.Distribution):
    """The metadata of a distribution `peft` of PEFT's version."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: peft\nVersion: {table.VERSION}\n"

    def locate_file(self, path: Any) -> Any:
        return path


def modules() -> dict[str, ModuleType]:
    """Every module of the drop-in by name, with the names that PEFT's module has."""
    objects = Objects()
    made = {path: _module(path) for path in names.modules()}
    for path, name, home in names.places():
        if home == path and objects.has(home, name):
            made[path].__dict__[name] = objects.of(home, name)
    for path, name, home in names.places():
        if home != path and name in vars(made[home]):
            made[path].__dict__[name] = vars(made[home])[name]
    _join(made)
    for path, module in made.items():
        if path != "peft":
            module.__dict__["__getattr__"] = functools.partial(_elsewhere, path, objects.by_name)
    return made


class Objects:
    """The objects that the names of PEFT's modules stand for."""

    def __init__(self) -> None:
        from .inside import INSIDE
        from .layers import LAYERS
        from .tables.objects import everything

        self.by_name = everything()
        """Objects whose name means the same in every module."""
        self.by_place: dict[str, Any] = {}
        """Objects of a single module or package, by the beginning of their path, and their name."""
        for kind, row in table.METHODS.items():
            for name, layer_class in LAYERS[kind].items():
                self.by_place[f"peft.tuners.{row.package}:{name}"] = layer_class
        for path, module in INSIDE.items():
            for name, value in vars(module).items():
                self.by_place[f"{path}:{name}"] = value

    def has(self, home: str, name: str) -> bool:
        return self._own(home, name) is not MISSING or reason_for(f"{home}.{name}") is not None

    def of(self, home: str, name: str) -> Any:
        """The object of a name, or a placeholder for one that the drop-in lacks."""
        found = self._own(home, name)
        if found is not MISSING:
            return found
        path = f"{home}.{name}"
        return placeholder(path, names.kind_of(home, name), str(reason_for(path)))

    def _own(self, home: str, name: str) -> Any:
        """The object of a name that the drop-in has; MISSING for others."""
        package = ".".join(home.split(".")[:3])
        for place in (f"{home}:{name}", f"{package}:{name}"):
            if place in self.by_place:
                return self.by_place[place]
        return self.by_name.get(name, MISSING)


MISSING = object()


def _elsewhere(path: str, everything: dict[str, Any], name: str) -> Any:
    """A name of another module: PEFT's modules import from each other, and programs import from any of them."""
    if name not in everything:
        raise AttributeError(f"module {path!r} has no attribute {name!r}")
    return everything[name]


def _module(path: str) -> ModuleType:
    module = ModuleType(path, "veneer, standing in for Hugging Face PEFT.")
    module.__spec__ = importlib.machinery.ModuleSpec(path, None, origin="veneer", is_package=True)
    module.__path__ = []
    module.__file__ = __file__
    setattr(module, MARK, True)
    return module


def _join(made: dict[str, ModuleType]) -> None:
    """Make submodules attributes of their packages, and fill in `__version__` and `__all__`."""
    for path, module in made.items():
        parent, _, name = path.rpartition(".")
        if parent:
            made[parent].__dict__.setdefault(name, module)
    made["peft.config"].__dict__["__version__"] = table.VERSION
    top = made["peft"].__dict__
    top["__version__"] = table.VERSION
    top["__all__"] = sorted(n for n in top if not n.startswith("_") and not isinstance(top[n], ModuleType))
