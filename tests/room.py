"""Tests and other processes: which code they run, how long a test waits for one, and how work is measured.

A busy machine must not fail a test. A wait ends when what it waits for is there; the limit is for what would never
come. Work is measured in time on the processor, which does not grow while others have it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
"""With this, another process imports veneer and the tests from the tree that the test is in."""
SECONDS = 1200
"""After which what did not come is taken for something that never will."""


@contextmanager
def at_most(seconds: float, what: str = "this") -> Iterator[None]:
    """Fail if the block takes more than so many seconds of this process's time on the processor."""
    start = time.process_time()
    yield
    used = time.process_time() - start
    assert used < seconds, f"{what} took {used:.1f} s on the processor, more than {seconds}"


def until(is_there: Callable[[], bool], what: str) -> None:
    """Wait until something is there."""
    end = time.monotonic() + SECONDS
    while not is_there():
        assert time.monotonic() < end, f"{what} did not come in {SECONDS} s"
        time.sleep(0.01)


def has_worked(pid: int, seconds: float) -> None:
    """Wait until a process has had so many more seconds on the processor."""
    import psutil

    process = psutil.Process(pid)
    start = sum(process.cpu_times()[:2])
    until(lambda: sum(process.cpu_times()[:2]) >= start + seconds, f"{seconds} s of work in process {pid}")
