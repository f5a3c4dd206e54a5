"""Dataclasses whose fields are checked, and which a file's mapping brings back."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, ClassVar

from ..errors import ConfigError, nearest, printable


class Checked:
    """A dataclass whose fields are checked: unknown names and wrong types are errors that say what would be right."""

    path_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that hold paths of other adapters."""

    def __new__(cls, *args: Any, **given: Any) -> Any:
        _check_names(cls, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            value = _revived(getattr(self, name), hint)
            if not _is_a(value, hint):
                raise ConfigError(f"{type(self).__name__}.{name} must be {_spell(hint)}, not {printable(repr(value))}")
            setattr(self, name, value)


class Settings(Checked):
    """A dataclass that is a field of a config (`eva_config`); in a file it is a mapping."""


@cache
def _hints(cls: Any) -> dict[str, Any]:
    """The types of a config's fields (not of its class variables, which name classes imported for checkers only)."""
    found = {}
    for f in fields(cls):
        owner = next(base for base in cls.__mro__ if f.name in base.__dict__.get("__annotations__", {}))
        found[f.name] = eval(str(f.type), vars(sys.modules[owner.__module__]))
    return found


def _check_names(cls: Any, given: Mapping[str, Any]) -> None:
    known = [f.name for f in fields(cls)]
    for name in given:
        if name not in known:
            raise ConfigError(f"{cls.__name__} has no field {name!r}{nearest(name, known)}")


def _revived(value: Any, hint: Any) -> Any:
    """The `Settings` that a file's mapping stands for, where the field holds some."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if isinstance(kind, type) and issubclass(kind, Settings)]
    if not kinds or not isinstance(value, dict):
        return value
    _check_names(kinds[0], value)
    return kinds[0](**{f.name: value[f.name] for f in fields(kinds[0]) if f.init and f.name in value})  # type: ignore[arg-type]


def _is_a(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_is_a(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_a(k, args[0]) and _is_a(v, args[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, type(None) if hint is None else hint)


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
