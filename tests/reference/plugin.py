"""A pytest plugin for running PEFT's tests: the drop-in first, a part of the tests, and a cache in the hub's place."""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tests

tests.__path__.append(str(Path("peft_tests").absolute()))  # some of theirs import helpers from a package of that name
SECONDS = 30
FEW = 1000
"""A file with at most so many tests is run whole."""
IS_OURS = os.environ["REFERENCE_LIBRARY"] == "veneer"


class Missing:
    """Stands for a name of PEFT's that is not there, so that only the tests that use it fail."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AttributeError("there is no such name in the drop-in")


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a file imports from PEFT."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peft":
            yield from ((str(node.module), alias.name) for alias in node.names)


def fill(module: str, name: str) -> None:
    """Put `Missing` where a module or a name is not there."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        found = sys.modules[module] = ModuleType(module)
        parent, _, last = module.rpartition(".")
        setattr(importlib.import_module(parent), last, found)
    if not hasattr(found, name):
        setattr(found, name, type(name, (Missing,), {}))


if IS_OURS:
    import veneer

    veneer.install_as_peft()
    for wanted in {pair for file in Path("peft_tests").glob("*.py") for pair in imports(file)}:
        fill(*wanted)


class Cached(dict[str, int]):
    """PEFT's tests note which models they have fetched: all of them."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regression", action="store_true")  # an option of PEFT's own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    part = int(os.environ["REFERENCE_PART"]) if len(items) > FEW else 1
    items[:] = [item for item in items if int(hashlib.md5(item.nodeid.encode()).hexdigest(), 16) % part == 0]
    for name, module in list(sys.modules.items()):
        if name.endswith("testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES = Cached()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    def stop(*ignored: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)
