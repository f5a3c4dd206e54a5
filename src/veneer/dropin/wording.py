"""Raising veneer's errors in PEFT's words, where a program enters the drop-in."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import VeneerError
from .tables.words import AT_ONCE, LATER, Row


@contextmanager
def pefts_words() -> Iterator[None]:
    """Inside, or in a function decorated with it, errors that PEFT has too are raised in its words and of its class."""
    try:
        yield
    except VeneerError as error:
        in_peft = translated(error)
        if in_peft is error:
            raise
        raise in_peft.with_traceback(error.__traceback__) from error.__cause__


def translated(error: VeneerError) -> VeneerError:
    """The error with PEFT's sentence in front of veneer's; the same error if PEFT has none."""
    text = str(error)
    found = _find(text)
    if found is None:
        return error
    row, match = found
    return _class_of(type(error), row.also)(f"{match.expand(row.peft)} ({text})")


def is_at_once(error: VeneerError) -> bool:
    """Whether PEFT raises an error when the config is made."""
    found = _find(str(error))
    return found is not None and found[0] in AT_ONCE


def _class_of(ours: type[VeneerError], peft: type[Exception] | None) -> type[VeneerError]:
    """A class of errors that is both veneer's and PEFT's."""
    if peft is None or issubclass(ours, peft):
        return ours
    return type(ours.__name__, (ours, peft), {"__module__": ours.__module__})


@functools.cache
def _find(text: str) -> tuple[Row, re.Match[str]] | None:
    """(row, match) of the row for a message of veneer's."""
    for row in (*AT_ONCE, *LATER):
        match = re.match(row.ours, text)
        if match:
            return row, match
    return None
