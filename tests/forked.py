"""A process of its own for what a test runs, without the seconds that imports take: a copy of the test's process."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .room import SECONDS


def veneer(*arguments: str, given: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """What `veneer ARGUMENTS` shows and its exit status, with some lines piped in; nothing is a terminal."""
    from veneer.cli import main

    def run() -> None:
        os.environ.update({"COLUMNS": "120", **environment})
        sys.argv = ["veneer", *arguments]
        main()

    return forked(run, given)


def script(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What running a file as a program shows."""

    def run() -> None:
        os.environ.update(environment)
        sys.path.insert(0, str(path.parent))
        sys.argv = [str(path)]
        runpy.run_path(str(path), run_name="__main__")

    return forked(run)


def forked(run: Callable[[], Any], given: str = "") -> subprocess.CompletedProcess[str]:
    """Call a function in a forked process; a signal that ends it is a negative status, as in `subprocess`."""
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / name for name in ("stdin", "stdout", "stderr")]
        files[0].write_text(given)
        pid = os.fork()
        if pid == 0:
            _child(run, files)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return subprocess.CompletedProcess([], status, files[1].read_text(), files[2].read_text())


def _child(run: Callable[[], Any], files: list[Path]) -> NoReturn:
    status = 1
    signal.alarm(SECONDS)
    try:
        for number, file in enumerate(files):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        sys.stdin, sys.stdout, sys.stderr = (open(n, "w" if n else "r", closefd=False) for n in range(3))  # noqa: SIM115
        run()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
