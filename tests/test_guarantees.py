"""The page of guarantees names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "guarantees.md").read_text()
NAMED = sorted(set(re.findall(r"(test_\w+\.py)::(test_\w+)", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED, ids="::".join)
def test_a_named_test_exists(file: str, name: str):
    tree = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_one():
    rows = [line for line in PAGE.partition("## Counts")[0].splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith(("| promise", "| what is done"))]
    assert len(promises) > 40 and all(re.search(r"test_\w+\.py::test_\w+", row) for row in promises)
