"""Locks on output directories: two commands that write into one directory at a time would destroy each other's results.

The operating system releases a lock when its process ends, however it ends. So a lock is never stale.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import VeneerError, printable
from ..terminal import duration

MOST_WORDS = 80
"""Characters of a command that an error shows."""


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Lock an output directory, or a file to be written, for the block. It need not exist; its parents are created.

    Directories that this creates, and the directory itself, are removed again if they are empty after an error.

    Raises:
        VeneerError: another process has locked it; the message names that process.
    """
    directory = directory.resolve()
    with _without_leftovers(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        place = _place(directory)
        lock = FileLock(place)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise VeneerError(
                f"{str(directory)!r} is in use by {_holder(place)}; wait until it has ended, or give another directory"
            ) from None
        try:
            _sign(place)
            yield
        finally:
            with suppress(OSError):
                place.unlink()
            lock.release()


def _place(directory: Path) -> Path:
    """The lock's file: next to the directory, or inside it if its parent is read-only, as with a mounted volume."""
    if directory.is_dir() and not os.access(directory.parent, os.W_OK):
        return directory / ".lock"
    return directory.parent / f".{directory.name}.lock"


@contextmanager
def _without_leftovers(directory: Path) -> Iterator[None]:
    """After an error in the block, remove the directory and the parents that did not exist before, if empty."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty, or not there
            for path in missing:
                path.rmdir()
        raise


def _sign(place: Path) -> None:
    """Write into the lock's file who holds it, for the errors of other processes."""
    program = Path(sys.argv[0]).name
    if program == "__main__.py":  # python -m veneer
        program = __name__.partition(".")[0]
    words = [program, *sys.argv[1:]]
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "command": " ".join(words)}
    with suppress(OSError):  # Windows does not let anyone write into a locked file
        place.write_text(json.dumps(holder), encoding="utf-8")


def _holder(place: Path) -> str:
    """The process that holds a lock, in words."""
    try:
        holder: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        command = printable(str(holder["command"]), MOST_WORDS)
        host = printable(str(holder["host"]))
        where = "" if host == socket.gethostname() else f" on {host}"
        since = duration(max(0.0, time.time() - float(holder["since"])))
        return f"process {int(holder['pid'])}{where} ({command}, for {since})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
