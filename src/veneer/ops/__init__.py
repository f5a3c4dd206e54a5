"""The fast paths: each gives what the plain path gives, rounding apart, and each can be switched off.

A path has the name of its file here. `with ops.plain("cross_entropy"): ...` takes the plain road for a while, `with
ops.plain(): ...` for all of them; the environment variable VENEER_PLAIN (names by commas, or "all") does for a process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import ConfigError

NAMES = frozenset(file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))
"""The fast paths there are."""


def is_fast(name: str) -> bool:
    """Whether the fast path `name` may be taken."""
    return name not in _plain


def is_autocast(device: str) -> bool:
    """Whether operations on a type of device choose their dtype by themselves; never on "meta"."""
    return device != "meta" and torch.is_autocast_enabled(device)


@contextmanager
def plain(*names: str) -> Iterator[None]:
    """Without the named fast paths, or without any."""
    before = set(_plain)
    _plain.update(_known(names) or NAMES)
    try:
        yield
    finally:
        _plain.clear()
        _plain.update(before)


def _known(names: tuple[str, ...]) -> frozenset[str]:
    if unknown := sorted(set(names) - NAMES):
        raise ConfigError(f"no fast path is called {', '.join(unknown)}; there are {', '.join(sorted(NAMES))}")
    return frozenset(names)


def _from_environment() -> set[str]:
    names = tuple(name for name in os.environ.get("VENEER_PLAIN", "").split(",") if name)
    return set(NAMES if names == ("all",) else _known(names))


_plain = _from_environment()
