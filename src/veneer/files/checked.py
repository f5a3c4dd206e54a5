"""Dataclasses that check the names and types of their fields, and can be created from a mapping in a file."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from typing import Any, ClassVar

from ..errors import ConfigError, nearest, printable


class Checked:
    """Base of dataclasses that raise ConfigError for fields with an unknown name or a value of the wrong type."""

    path_fields: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that hold paths of other adapters."""

    def __new__(cls, *args: Any, **values: Any) -> Any:
        _check_names(cls, values)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            value = _restored(getattr(self, name), hint)
            if not _is_a(value, hint):
                field = f"{type(self).__name__}.{name}"
                raise ConfigError(f"{field} must be {_spell(hint)}, not {printable(repr(value))}")
            setattr(self, name, value)


class Settings(Checked):
    """Base of dataclasses that are values of a config's fields, such as `eva_config`; in a file they are mappings."""


@cache
def _hints(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, by name.

    Class variables are left out: their annotations name classes that are imported for type checkers only.
    """
    hints = {}
    for f in fields(cls):
        module = sys.modules[_owner(cls, f.name).__module__]
        hints[f.name] = eval(str(f.type), vars(module))
    return hints


def _owner(cls: type, field: str) -> type:
    """The class whose body annotates a field."""
    for base in cls.__mro__:
        if field in base.__dict__.get("__annotations__", {}):
            return base
    raise AssertionError(f"{field} is no field of {cls.__name__}")


def _check_names(cls: Any, names: Iterable[str]) -> None:
    known = [f.name for f in fields(cls)]
    for name in names:
        if name not in known:
            raise ConfigError(f"{cls.__name__} has no field {name!r}{nearest(name, known)}")


def _restored(value: Any, hint: Any) -> Any:
    """The value of a field; a mapping from a file becomes the `Settings` that the field holds."""
    cls = _settings_class(hint)
    if cls is None or not isinstance(value, dict):
        return value
    _check_names(cls, value)
    arguments = {}
    for f in fields(cls):
        if f.init and f.name in value:
            arguments[f.name] = value[f.name]
    return cls(**arguments)


def _settings_class(hint: Any) -> Any:
    """The subclass of `Settings` in a type, or None."""
    for alternative in typing.get_args(hint) or (hint,):
        if isinstance(alternative, type) and issubclass(alternative, Settings):
            return alternative
    return None


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value has a type; ints count as floats, and tuples as lists."""
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    if origin is list:
        if not isinstance(value, (list, tuple)):
            return False
        return all(_is_a(item, args[0]) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            return False
        key_hint, item_hint = args
        return all(_is_a(key, key_hint) and _is_a(item, item_hint) for key, item in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, type(None) if hint is None else hint)


def _spell(hint: Any) -> str:
    """A type as it is written in code."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
