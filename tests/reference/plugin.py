"""A pytest plugin for running PEFT's tests: the drop-in first, a part of the tests, and a cache in the hub's place."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tests

tests.__path__.append(str(Path("peft_tests").absolute()))  # some of theirs import helpers from a package of that name
SECONDS = 30

if os.environ["REFERENCE_LIBRARY"] == "veneer":
    import veneer

    veneer.install_as_peft()


class Cached(dict[str, int]):
    """PEFT's tests note which models they have fetched: all of them."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regression", action="store_true")  # an option of PEFT's own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    chosen = _chosen(items)
    items[:] = [item for item in items if item.nodeid in chosen]
    for name, module in list(sys.modules.items()):
        if name.endswith("testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES = Cached()


def _chosen(items: list[pytest.Item]) -> set[str]:
    """The tests to run: those listed in a file, or a part of all, chosen by a hash of their names."""
    listed = os.environ.get("REFERENCE_TESTS")
    if listed is not None:
        return set(json.loads(Path(listed).read_text()))
    lengths = Counter(item.path for item in items)
    chosen = set()
    for item in items:
        is_long = lengths[item.path] > int(os.environ["REFERENCE_FEW"])
        part = int(os.environ["REFERENCE_PART"]) if is_long else 1
        if int(hashlib.md5(item.nodeid.encode()).hexdigest(), 16) % part == 0:
            chosen.add(item.nodeid)
    return chosen


OUTCOMES: dict[str, str] = {}
"""What came of each test: "passed", "skipped", or the first line of what went wrong. A file that fails to import has
an entry under its own name."""


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        lines = str(report.longrepr).strip().splitlines()
        OUTCOMES[report.nodeid] = "does not import: " + lines[-1].removeprefix("E").strip()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    before = OUTCOMES.get(report.nodeid, "passed")
    if before == "passed":
        OUTCOMES[report.nodeid] = _outcome(report)


def _outcome(report: pytest.TestReport) -> str:
    if not report.failed:
        return report.outcome
    crash = getattr(report.longrepr, "reprcrash", None)
    message = str(report.longrepr) if crash is None else crash.message
    return re.sub(r"0x[0-9a-f]+", "0x", message.strip().split("\n")[0])[:200]


def pytest_sessionfinish() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        Path(os.environ["REFERENCE_OUTCOMES"]).write_text(json.dumps(OUTCOMES))


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
