"""Installing the drop-in: PEFT's modules in `sys.modules`, and a distribution that says which PEFT is installed."""

from __future__ import annotations

import fnmatch
import functools
import importlib.machinery
import importlib.metadata
import sys
from types import ModuleType
from typing import Any

from ..errors import VeneerError
from ..upstream.peft import accept
from .tables import methods as table

MARK = "_veneer_drop_in"
"""An attribute of the drop-in's modules, which the real PEFT lacks."""
OF_LORA = ("veneer.", "peft.tuners.lora.")
"""Beginnings of the modules of config classes that `peft.tuners.lora` has."""
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
    """Every module of the drop-in by name."""
    from .tables import modules as names

    everything = names.everything()
    made: dict[str, ModuleType] = {}
    for path, patterns in sorted(_patterns(names).items()):
        contents: dict[str, Any] = {}
        for pattern in patterns:
            contents |= _matching(everything, pattern)
        made[path] = _module(path, contents)
    _add_layers(made)
    _add_settings_of_lora(made, everything)
    _add_parents(made)
    _join(made)
    for path, module in made.items():
        if path != "peft":
            module.__dict__["__getattr__"] = functools.partial(_elsewhere, path, everything)
    return made


def _patterns(names: Any) -> dict[str, list[str]]:
    """The patterns of the names in each module, by its path."""
    patterns = {path: words.split() for path, words in names.MODULES.items()}
    for row in table.METHODS.values():
        package = f"peft.tuners.{row.package}"
        for path in (package, f"{package}.config", f"{package}.model", f"{package}.layer"):
            patterns.setdefault(path, []).extend([row.config, row.model])
    patterns["peft"] = names.TOP.split()
    return patterns


def _elsewhere(path: str, everything: dict[str, Any], name: str) -> Any:
    """A name of another module: PEFT's modules import from each other, and programs import from any of them."""
    if name not in everything:
        raise AttributeError(f"module {path!r} has no attribute {name!r}")
    return everything[name]


def _matching(everything: dict[str, Any], pattern: str) -> dict[str, Any]:
    if "*" in pattern:
        return {name: value for name, value in everything.items() if fnmatch.fnmatchcase(name, pattern)}
    return {pattern: everything[pattern]} if pattern in everything else {}


def _module(path: str, contents: dict[str, Any]) -> ModuleType:
    module = ModuleType(path, "veneer, standing in for Hugging Face PEFT.")
    module.__spec__ = importlib.machinery.ModuleSpec(path, None, origin="veneer", is_package=True)
    module.__path__ = []
    module.__file__ = __file__
    module.__dict__.update(contents)
    setattr(module, MARK, True)
    return module


def _add_layers(made: dict[str, ModuleType]) -> None:
    """Add the layer classes of each method to its package."""
    from .layers import LAYERS

    for kind, row in table.METHODS.items():
        package = f"peft.tuners.{row.package}"
        classes = LAYERS[kind]
        for path in (package, f"{package}.layer"):
            made[path].__dict__.update(classes)
        quantised = {name: classes[name] for name in row.layers if name in table.QUANTISED}
        if quantised:
            made[f"{package}.bnb"] = _module(f"{package}.bnb", quantised)
    made["peft.helpers"].__dict__["LoraLayer"] = LAYERS["LORA"]["LoraLayer"]


def _add_settings_of_lora(made: dict[str, ModuleType], everything: dict[str, Any]) -> None:
    """Add the config classes of LoRA's variants to its package, and the contents of its submodules."""
    configs = {}
    for name, value in everything.items():
        if name.endswith("Config") and not name.startswith("Peft") and value.__module__.startswith(OF_LORA):
            configs[name] = value
    lora = made["peft.tuners.lora"].__dict__
    lora.update(configs)
    made["peft.tuners.lora.config"].__dict__.update(configs)
    for submodule in ("arrow", "conversion", "eva", "loraga"):
        contents = vars(made[f"peft.tuners.lora.{submodule}"])
        lora.update({name: value for name, value in contents.items() if not name.startswith("__")})


def _add_parents(made: dict[str, ModuleType]) -> None:
    """Add an empty module for each package that only has submodules."""
    for path in list(made):
        parent = path.rpartition(".")[0]
        while parent and parent not in made:
            made[parent] = _module(parent, {})
            parent = parent.rpartition(".")[0]


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
