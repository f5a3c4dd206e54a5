"""Registering the drop-in: `sys.modules`, and the metadata that tells other libraries which PEFT is installed."""

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
PROBES = ("is_peft_available", "is_peft_greater_or_equal")


def install(strict: bool) -> None:
    """Put the drop-in's modules in the place of PEFT's.

    Raises:
        VeneerError: the real PEFT is imported already, and code holds on to it.
    """
    from .strict import set_strict
    from .tables import words as wording

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
        _use_layers()
        wording.use()
        _forget_probes()
        accept(table.VERSION)


def _use_layers() -> None:
    from ..core.state import State
    from .layers import PeftLayer

    State.layer_class = PeftLayer


def _forget_probes() -> None:
    """transformers and others remember whether PEFT is there; let them look again."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("transformers", "accelerate", "diffusers", "trl"):
            for probe in PROBES:
                function = vars(module).get(probe)
                if hasattr(function, "cache_clear"):
                    function.cache_clear()
            if "_peft_available" in vars(module):
                module._peft_available = True  # type: ignore[attr-defined]


class Distributions(importlib.metadata.DistributionFinder):
    """Finds the distribution `peft` of the version that is stood in for."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.split(".")[0] != "peft":
            return None
        found = sys.modules.get(fullname)
        return None if found is None else found.__spec__

    def find_distributions(self, context: Any = importlib.metadata.DistributionFinder.Context()) -> Any:  # noqa: B008
        if context.name in (None, "peft", "Peft", "PEFT"):
            yield Distribution()


class Distribution(importlib.metadata.Distribution):
    def read_text(self, filename: str) -> str | None:
        name, version = "peft", table.VERSION
        return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return path


def modules() -> dict[str, ModuleType]:
    """Every module of the drop-in by name."""
    from .tables import modules as names

    flat = contents(names)
    found: dict[str, ModuleType] = {}
    wanted = {path: patterns.split() for path, patterns in names.MODULES.items()}
    for row in table.METHODS.values():
        package = f"peft.tuners.{row.package}"
        for path in (package, f"{package}.config", f"{package}.model", f"{package}.layer"):
            wanted.setdefault(path, []).extend([row.config, row.model])
    wanted["peft"] = names.TOP.split()
    for path in sorted(wanted):
        found[path] = _module(path, {n: v for p in wanted[path] for n, v in _matching(flat, p)})
    _add_layers(found, flat)
    _join(found)
    for path, module in found.items():
        if path != "peft":
            module.__dict__["__getattr__"] = functools.partial(_elsewhere, path, flat)
    return found


def _elsewhere(path: str, flat: dict[str, Any], name: str) -> Any:
    """PEFT's modules also hold what they import from each other, and programs import it from there."""
    if name not in flat:
        raise AttributeError(f"module {path!r} has no attribute {name!r}")
    return flat[name]


def contents(names: Any) -> dict[str, Any]:
    return names.everything()


def _matching(flat: dict[str, Any], pattern: str) -> list[tuple[str, Any]]:
    if "*" not in pattern:
        return [(pattern, flat[pattern])] if pattern in flat else []
    return [(name, value) for name, value in flat.items() if fnmatch.fnmatchcase(name, pattern)]


def _module(path: str, content: dict[str, Any]) -> ModuleType:
    module = ModuleType(path, "veneer, standing in for Hugging Face PEFT.")
    module.__spec__ = importlib.machinery.ModuleSpec(path, None, origin="veneer", is_package=True)
    module.__path__ = []
    module.__file__ = __file__
    module.__dict__.update(content)
    setattr(module, MARK, True)
    return module


def _add_layers(found: dict[str, ModuleType], flat: dict[str, Any]) -> None:
    """Each method's layer classes and what its package gathers."""
    from .layers import LAYERS

    for kind, row in table.METHODS.items():
        package = f"peft.tuners.{row.package}"
        for path in (package, f"{package}.layer"):
            found[path].__dict__.update(LAYERS[kind])
        quantised = {name: LAYERS[kind][name] for name in row.layers if name in table.QUANTISED}
        if quantised:
            found[f"{package}.bnb"] = _module(f"{package}.bnb", quantised)
    found["peft.helpers"].__dict__["LoraLayer"] = LAYERS["LORA"]["LoraLayer"]
    lora = found["peft.tuners.lora"].__dict__
    for path in ("peft.tuners.lora", "peft.tuners.lora.config"):
        names = [n for n in flat if n.endswith("Config") and flat[n].__module__.startswith("veneer.")]
        found[path].__dict__.update({n: flat[n] for n in names if not n.startswith("Peft")})
    for name in ("arrow", "conversion", "eva", "loraga"):
        lora.update({n: v for n, v in vars(found[f"peft.tuners.lora.{name}"]).items() if not n.startswith("__")})


def _join(found: dict[str, ModuleType]) -> None:
    """Parents hold their submodules."""
    for path in list(found):
        parent, _, name = path.rpartition(".")
        while parent and parent not in found:
            found[parent] = _module(parent, {})
            parent = parent.rpartition(".")[0]
    for path, module in found.items():
        parent, _, name = path.rpartition(".")
        if parent:
            found[parent].__dict__.setdefault(name, module)
    top = found["peft"].__dict__
    top["__version__"] = found["peft.config"].__dict__["__version__"] = table.VERSION
    top["__all__"] = sorted(n for n in top if not n.startswith("_") and not isinstance(top[n], ModuleType))
