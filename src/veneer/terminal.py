"""How far a command has come: bars on a terminal, some plain lines anywhere else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 5
"""Plain lines for one thing that is done."""
Step = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and of how many."""


@contextmanager
def showing() -> Iterator[Step]:
    """Inside, calls of what this gives show progress on stderr; bars are gone afterwards."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {}

        def step(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done)

        yield step


def _lines(console: Console) -> Step:
    said: dict[str, int] = {}

    def step(what: str, done: int, of: int) -> None:
        if done * LINES // of > said.get(what, 0):
            said[what] = done * LINES // of
            console.print(f"{what}: {done} of {of}", markup=False)

    return step


def quiet() -> None:
    """No progress bars and no advice from transformers; no warnings of the libraries below us."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"torch\.|transformers\.|accelerate\.")
