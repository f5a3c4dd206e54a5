"""Methods in variants that combine: each variant is a class that overrides one aspect and goes on by `super()`.

A config that is `Variants` knows what asks for which; its `adapter` is the class composed of those it is asked for.
"""

from __future__ import annotations

import copyreg
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.config import Config, all_methods
from ...errors import ConfigError
from ...files.checked import Settings


class Aspect:
    """What a variant may tell the config it is composed for."""

    settings: ClassVar[type[Settings] | None] = None
    pads: ClassVar[bool] = True
    """Further ranks of zeros change nothing."""

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise ConfigError where settings, its own or those beside it, do not fit."""

    @classmethod
    def before(cls, config: Any, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        """As `Config.before`."""

    @classmethod
    def after(cls, config: Any, facts: dict[Any, Any], output: Any) -> None:
        """As `Config.after`."""

    @classmethod
    def loss(cls, config: Any, adapters: Sequence[Any]) -> Tensor | None:
        """As `Config.loss`, of the layers' adapters that are of this class."""
        return None


CLASSES: dict[str, type[Adapter]] = {}
"""A variant's class by its file's name."""


class Composition:
    """`Config.adapter` of a method in variants: on a config composed of its `classes()`, on the class the own one."""

    def __init__(self, own: type[Adapter]) -> None:
        self.own = own

    def __set_name__(self, owner: type[Config], name: str) -> None:
        CLASSES[owner.__module__.rpartition(".")[2]] = self.own

    def __get__(self, config: Any, owner: type[Config]) -> type[Adapter]:
        return self.own if config is None else compose(*config.classes())


class Composed(type):
    """The class of composed classes. They have no place in a module, so a pickle holds their parts instead."""


def _reduce(cls: type) -> tuple[Any, ...]:
    return compose, cls.__bases__


copyreg.pickle(Composed, _reduce)  # type: ignore[arg-type]


@cache
def compose(*parts: type[Adapter]) -> type[Adapter]:
    """One class of several parts, outermost first; it adapts what all of them can. The same parts, the same class."""
    if len(parts) == 1:
        return parts[0]
    kinds = frozenset.intersection(*(part.kinds for part in parts))
    made: Any = Composed("+".join(part.__name__ for part in parts), parts, {"kinds": kinds, "__module__": __name__})
    return made


class Variants(Config):
    """A config that may ask for variants. Subclasses complete the settings before other checks, and check them last."""

    files: ClassVar[Mapping[str, str]]
    """The files of the variants by what asks for them, a field or a start's name; outermost first."""
    plain: ClassVar[Any]
    """The class without variants."""
    starts: ClassVar[str]
    """The field that holds a start's name."""
    details: ClassVar[Mapping[str, str]] = {}
    """Fields that say something only beside another one."""

    def variants(self) -> list[str]:
        """What of `files` is asked for."""
        start = getattr(self, self.starts)
        return [name for name in self.files if getattr(self, name, name == start) not in (None, False, [])]

    def classes(self) -> list[Any]:
        """The classes to compose, outermost first."""
        files = [self.files[name] for name in self.variants()]
        if any(file not in CLASSES for file in files):
            all_methods()
        return [CLASSES[file] for file in files] or [self.plain]

    def complete_settings(self) -> None:
        """A mapping, as the file has it, becomes the variant's own class."""
        for name, variant in zip(self.variants(), self.classes(), strict=False):
            given = getattr(self, name, None)
            if variant.settings is not None and isinstance(given, dict):
                setattr(self, name, variant.settings(**given))
            elif variant.settings is not None and not isinstance(given, variant.settings):
                raise ConfigError(f"{name} must be a {variant.settings.__name__}, not {given!r}")

    def check_variants(self) -> None:
        for variant in self.classes():
            variant.check(self)
        file = type(self).__module__.rpartition(".")[2]
        for name in (n for n, f in self.files.items() if f == file and n not in self.variants()):
            field = name if hasattr(self, name) else self.starts
            raise ConfigError(
                f"{type(self).__name__} stands for {field} that asks for its variant; "
                f"with {field}={getattr(self, field)!r} use {type(self).__mro__[1].__name__}"
            )

    def before(self, shared: nn.Module | None, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        for variant in self.classes():
            variant.before(self, facts, model, kwargs)

    def after(self, facts: dict[Any, Any], output: Any) -> None:
        for variant in self.classes():
            variant.after(self, facts, output)

    def loss(self, adapters: Sequence[Adapter]) -> Tensor | None:
        parts = [part for adapter in adapters for part in adapter.parts]
        terms = [v.loss(self, [part for part in parts if isinstance(part, v)]) for v in self.classes()]
        given = [term for term in terms if term is not None]
        return torch.stack(given).sum() if given else None

    def to_dict(self) -> dict[str, Any]:
        """Fields of variants only where they say something: older readers know few of them."""
        asked = self.variants()
        silent = {name for name in self.files if name not in asked}
        silent |= {name for name, beside in self.details.items() if beside not in asked}
        return {name: value for name, value in super().to_dict().items() if name not in silent}
