"""Methods whose variants can be combined: each variant is a class that overrides one aspect and calls `super()`.

A `Variants` config determines which of its fields request which variants. Its `adapter` is a class composed of the
requested variants.
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
    """Hooks of a variant, which are called by the config that requests it."""

    settings: ClassVar[type[Settings] | None] = None
    """The class of the settings that request the variant; None if a bool or a name requests it."""
    pads: ClassVar[bool] = True
    """Whether the rank can be padded with zeros without changing the result."""

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise ConfigError if the variant's settings are invalid, alone or with the config's other settings."""

    @classmethod
    def before(cls, config: Any, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        """As `Config.before`."""

    @classmethod
    def after(cls, config: Any, facts: dict[Any, Any], output: Any) -> None:
        """As `Config.after`."""

    @classmethod
    def depends_on_call(cls) -> bool:
        """As `Config.depends_on_call`."""
        hooks = (cls.before.__func__, cls.after.__func__)  # type: ignore[attr-defined]
        return hooks != (Aspect.before.__func__, Aspect.after.__func__)  # type: ignore[attr-defined]

    @classmethod
    def loss(cls, config: Any, adapters: Sequence[Any]) -> Tensor | None:
        """As `Config.loss`, for the adapters of the layers that are instances of this class."""
        return None


CLASSES: dict[str, type[Adapter]] = {}
"""The class of each variant, by the name of its file."""


class Composition:
    """`Config.adapter` of a method with variants.

    On a config instance it is the class composed of the config's `classes()`; on the config class, the variant alone.
    """

    def __init__(self, variant: type[Adapter]) -> None:
        self.variant = variant

    def __set_name__(self, owner: type[Config], name: str) -> None:
        CLASSES[_file_of(owner)] = self.variant

    def __get__(self, config: Any, owner: type[Config]) -> type[Adapter]:
        if config is None:
            return self.variant
        return compose(*config.classes())


def _file_of(config_class: type[Config]) -> str:
    """The name of the file that defines a config."""
    return config_class.__module__.rpartition(".")[2]


class Composed(type):
    """The type of composed classes. They are not attributes of a module, so they are pickled by their base classes."""


def _reduce(cls: type) -> tuple[Any, ...]:
    return compose, cls.__bases__


copyreg.pickle(Composed, _reduce)  # type: ignore[arg-type]


@cache
def compose(*parts: type[Adapter]) -> type[Adapter]:
    """Compose one class from several, outermost first, for the kinds of target that all of them support.

    The same parts always result in the same class.
    """
    if len(parts) == 1:
        return parts[0]
    name = "+".join(part.__name__ for part in parts)
    kinds = frozenset.intersection(*(part.kinds for part in parts))
    composed: Any = Composed(name, parts, {"kinds": kinds, "__module__": __name__})
    return composed


class Variants(Config):
    """A config that may request variants.

    Subclasses call `complete_settings` before their other checks and `check_variants` after them.
    """

    files: ClassVar[Mapping[str, str]]
    """The file of each variant, by the field or the initialisation that requests it; outermost first."""
    plain: ClassVar[Any]
    """The class without variants."""
    starts: ClassVar[str]
    """The field that names the initialisation."""
    details: ClassVar[Mapping[str, str]] = {}
    """Fields that have an effect only together with another field, with the name of that field."""

    def variants(self) -> list[str]:
        """The keys of `files` that this config requests."""
        start = getattr(self, self.starts)
        requested = []
        for name in self.files:
            value = getattr(self, name, name == start)
            if value not in (None, False, []):
                requested.append(name)
        return requested

    def classes(self) -> list[Any]:
        """The classes to compose, outermost first."""
        files = [self.files[name] for name in self.variants()]
        if not files:
            return [self.plain]
        if any(file not in CLASSES for file in files):
            all_methods()  # imports the files, which fills CLASSES
        return [CLASSES[file] for file in files]

    def complete_settings(self) -> None:
        """Convert settings that are given as a mapping, as in a file, to the variant's settings class."""
        for name, variant in zip(self.variants(), self.classes(), strict=False):  # without variants there is one class
            settings_class = variant.settings
            if settings_class is None:
                continue
            value = getattr(self, name, None)
            if isinstance(value, dict):
                setattr(self, name, settings_class(**value))
            elif not isinstance(value, settings_class):
                raise ConfigError(f"{name} must be a {settings_class.__name__}, not {value!r}")

    def check_variants(self) -> None:
        """Raise ConfigError if the requested variants do not fit the config or its class."""
        for variant in self.classes():
            variant.check(self)
        file = _file_of(type(self))
        requested = self.variants()
        for name, variant_file in self.files.items():
            if variant_file == file and name not in requested:
                field = name if hasattr(self, name) else self.starts
                raise ConfigError(
                    f"{type(self).__name__} needs {field} to request its variant; "
                    f"with {field}={getattr(self, field)!r} use {type(self).__mro__[1].__name__}"
                )

    def depends_on_call(self) -> bool:
        return any(variant.depends_on_call() for variant in self.classes())

    def before(self, shared: nn.Module | None, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        for variant in self.classes():
            variant.before(self, facts, model, kwargs)

    def after(self, facts: dict[Any, Any], output: Any) -> None:
        for variant in self.classes():
            variant.after(self, facts, output)

    def loss(self, adapters: Sequence[Adapter]) -> Tensor | None:
        parts: list[Adapter] = []
        for adapter in adapters:
            parts += adapter.parts
        terms = []
        for variant in self.classes():
            term = variant.loss(self, [part for part in parts if isinstance(part, variant)])
            if term is not None:
                terms.append(term)
        return torch.stack(terms).sum() if terms else None

    def to_dict(self) -> dict[str, Any]:
        """Leave out the fields of variants that are not requested, because older versions do not know all of them."""
        requested = self.variants()
        content = super().to_dict()
        for name in self.files:
            if name not in requested:
                content.pop(name, None)
        for name, condition in self.details.items():
            if condition not in requested:
                content.pop(name, None)
        return content
