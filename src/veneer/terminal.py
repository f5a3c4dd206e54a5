"""Terminal output: progress, sizes and durations, and silencing the messages of other libraries.

rich is imported when something is shown: it takes as long to import as all of veneer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

LINES = 5
"""If stderr is not a terminal, a progress line appears each time that a task has taken a fifth longer."""
PATIENCE = 10.0
"""The least time between two of these lines, in seconds."""
JOINERS = "\u200c\u200d"
"""Invisible characters that are shown as they are: emoji and some scripts need them."""
UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
Step = Callable[[str, int, int], None]
"""Called with the name of a task, the number of finished items, and their total."""
Item = TypeVar("Item")


@contextmanager
def showing(console: Console | None = None) -> Iterator[Step]:
    """Yield a function that shows progress on stderr, or on a console that is given.

    On a terminal it draws bars, which are removed at the end; elsewhere it prints a few lines.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = console or Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield progress_lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {}

        def step(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done)

        yield step


def tracked(items: Collection[Item], what: str, shown: bool) -> Iterator[Item]:
    """Yield the items, and show progress if `shown` is true."""
    if not shown:
        yield from items
        return
    with showing() as step:
        for done, item in enumerate(items):
            step(what, done, len(items))
            yield item
        step(what, len(items), len(items))


def size(count: float) -> str:
    """Format a number of bytes in decimal units with three digits: "1.23 GB"."""
    for scale, unit in UNITS:
        if count >= 1000 * scale:
            return f"{count / scale:,.0f} {unit}"
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} bytes"


def clock(seconds: float) -> str:
    """Format a duration as minutes and seconds ("3:05"), with hours if there are any ("1:03:05")."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration(seconds: float) -> str:
    """Format a duration with units: "42 s", "3 min 05 s", "1 h 03 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def visible(text: str) -> str:
    """A text with signs for line breaks and tabs, and escapes for what a terminal would obey or not show."""
    shown = []
    for character in text:
        if character == "\n":
            shown.append("⏎\n")
        elif character == "\t":
            shown.append("⇥")
        elif character.isprintable() or character in JOINERS:
            shown.append(character)
        else:
            shown.append(character.encode("unicode_escape", "backslashreplace").decode())
    return "".join(shown)


def quiet() -> None:
    """Turn off transformers' progress bars and advice, and the warnings of torch, transformers and accelerate."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"torch\.|transformers\.|accelerate\.")


def remark(sentences: Iterable[str]) -> None:
    """Print sentences that are no part of the result to stderr, one a line."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    for sentence in sentences:
        console.print(sentence, style="dim", markup=False, soft_wrap=True)


def progress_lines(console: Console) -> Step:
    """A function that prints a line at the end of each task, and more if it takes longer than `PATIENCE`."""
    started: dict[str, float] = {}
    printed: dict[str, float] = {}
    finished: set[str] = set()

    def step(what: str, done: int, of: int) -> None:
        time = monotonic()
        start = started.setdefault(what, time)
        waited = time - printed.get(what, start)
        is_over = done == of
        if is_over and what in finished:
            return
        if is_over:
            finished.add(what)
        is_due = waited >= max(PATIENCE, (time - start) / LINES)
        if not is_due and not is_over:
            return
        printed[what] = time
        left = f", {clock((time - start) * (of - done) / done)} left" if 0 < done < of else ""
        console.print(f"{what}: {done} of {of}{left}", markup=False)

    return step
