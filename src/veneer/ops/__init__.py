"""Fast paths: each gives the result of the plain code, up to rounding, and each can be switched off.

A fast path has the name of its file. `with ops.plain("cross_entropy"): ...` switches one off inside the block, `with
ops.plain(): ...` switches off all. The environment variable VENEER_PLAIN (comma-separated names, or "all") does so for
the whole process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import ConfigError

NAMES = frozenset(file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))
"""The names of all fast paths."""


def is_fast(name: str) -> bool:
    """Whether the fast path `name` is switched on."""
    return name not in _plain


def is_autocast(device: str) -> bool:
    """Whether autocast is on for a device type; never for "meta"."""
    return device != "meta" and torch.is_autocast_enabled(device)


@contextmanager
def plain(*names: str) -> Iterator[None]:
    """Switch off the named fast paths inside the block, or all of them if none is named.

    Raises:
        ConfigError: a name is unknown.
    """
    before = set(_plain)
    _check_names(names)
    _plain.update(names or NAMES)
    try:
        yield
    finally:
        _plain.clear()
        _plain.update(before)


def _check_names(names: tuple[str, ...]) -> None:
    unknown = sorted(set(names) - NAMES)
    if unknown:
        raise ConfigError(f"unknown fast paths: {', '.join(unknown)}; known ones are {', '.join(sorted(NAMES))}")


def _from_environment() -> set[str]:
    value = os.environ.get("VENEER_PLAIN", "")
    names = tuple(name for name in value.split(",") if name)
    if names == ("all",):
        return set(NAMES)
    _check_names(names)
    return set(names)


_plain = _from_environment()
