"""What the drop-in does not have: such a name can be imported, and raises an error with the reason when it is used."""

from __future__ import annotations

import fnmatch
from typing import Any

from ..errors import VeneerError
from .tables.absent import ABSENT


class NotInDropIn(VeneerError, NotImplementedError):
    """A part of PEFT that veneer does not have under its name."""


def reason_for(path: str, table: dict[str, str] = ABSENT) -> str | None:
    """Why the drop-in lacks a name, given with its module or class; None if it is not among those that it lacks."""
    for reason, patterns in table.items():
        for pattern in patterns.split():
            if fnmatch.fnmatchcase(path, pattern):
                return reason
    return None


def placeholder(path: str, kind: str, reason: str) -> Any:
    """A class or a function that raises NotInDropIn when it is called, or when it is subclassed."""
    name = path.rpartition(".")[2]
    message = f"{path} is not part of veneer under the name peft: {reason}"
    if kind == "value":
        return AbsentValue(message)
    if kind == "class":
        return Absent(name, (), {"absent": message, "__module__": path.rpartition(".")[0]})

    def raises(*args: Any, **kwargs: Any) -> Any:
        raise NotInDropIn(message)

    raises.__name__ = name
    raises.absent = message  # type: ignore[attr-defined]
    return raises


class Absent(type):
    """Metaclass of classes that are not there: nothing is an instance of them, and none can be made."""

    absent: str

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        for base in bases:
            if isinstance(base, Absent):
                raise NotInDropIn(base.absent)
        return super().__new__(cls, name, bases, namespace)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotInDropIn(cls.absent)


class AbsentValue:
    """A constant that is not there: it can be imported, and raises NotInDropIn when it is read."""

    def __init__(self, absent: str) -> None:
        self.absent = absent

    def _raise(self, *args: Any) -> Any:
        raise NotInDropIn(self.absent)

    __getitem__ = __iter__ = __len__ = __contains__ = __bool__ = _raise
