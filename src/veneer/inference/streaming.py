"""Show answers while they are generated: a single one as running text, several side by side in columns."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer

from .generation import Answer, Writer

NARROW = 32
"""Minimum width of a column in characters. On a narrower terminal, answers are shown one below the other."""
COLOURS = ("white", "cyan", "magenta", "yellow", "green", "blue")
"""Colours of the columns, in order."""


class Running(TextStreamer):
    """Prints one answer to a file, word by word."""

    def __init__(self, tokenizer: Any, to: IO[str] | None = None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.to = to or sys.stdout

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, file=self.to, flush=True, end="\n" if stream_end else "")


class Columns:
    """Several answers side by side on a terminal, each in a growing column."""

    def __init__(self, names: Sequence[str], tokenizer: Any, stops: set[int], console: Console) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self.console = console
        self.tokens: dict[str, list[int]] = {name: [] for name in names}
        self.notes: dict[str, str] = {}

    def rows(self, names: Sequence[str]) -> Rows:
        """A streamer for a batch whose rows are the answers of `names`."""
        return Rows(self, names)

    def __rich__(self) -> RenderableType:
        panels = [self._panel(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(self.tokens)]
        if self.console.width // len(panels) < NARROW:
            return Group(*panels)
        grid = Table.grid(expand=True)
        for _ in panels:
            grid.add_column(ratio=1)
        grid.add_row(*panels)
        return grid

    def _panel(self, name: str, colour: str) -> Panel:
        text = self.tokenizer.decode(self.tokens[name], skip_special_tokens=True)
        text = text.removesuffix("\ufffd")  # an incomplete character; its remaining tokens follow
        title = Text(name, style=f"bold {colour}")
        return Panel(Text(text), title=title, subtitle=self.notes.get(name), border_style=colour)


class Rows(BaseStreamer):
    """A streamer that distributes the tokens of a batch to columns."""

    def __init__(self, columns: Columns, names: Sequence[str]) -> None:
        self.columns = columns
        self.names = names
        self.done = [False] * len(names)
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompts, (batch, length), in the first call, and one token per row, (batch,), in all others."""
        if self.is_prompt:
            self.is_prompt = False
            return
        for row, token in enumerate(value.flatten().tolist()):
            self.done[row] = self.done[row] or token in self.columns.stops
            if not self.done[row]:
                self.columns.tokens[self.names[row]].append(token)

    def end(self) -> None:
        pass


class Interrupt(StoppingCriteria):
    """Stops the current answer at Ctrl-C; a second Ctrl-C raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.wanted = False

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.wanted, dtype=torch.bool, device=input_ids.device)

    @contextmanager
    def listening(self) -> Any:
        """Inside the block, Ctrl-C stops the answer instead of the program."""
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield StoppingCriteriaList([self])
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True


def note(answer: Answer, most: int) -> str:
    """How an answer ended, in a few words."""
    if answer.ended:
        return f"{answer.tokens} tokens"
    if answer.tokens >= most:
        return f"cut at {most} tokens"
    return f"stopped after {answer.tokens} tokens"


def show(
    writer: Writer,
    prompts: dict[str, list[int]],
    console: Console,
    *,
    criteria: Any = None,
    headings: bool = True,
) -> dict[str, Answer]:
    """Generate and show the answers of several models: in columns on a terminal, otherwise one after the other.

    Args:
        prompts: the tokens for each model, by its name.
        console: where the answers are shown.
        headings: show the name of the model even if there is only one.
    """
    if len(prompts) > 1 and console.is_terminal:
        return _in_columns(writer, prompts, console, criteria)
    answers: dict[str, Answer] = {}
    for name, prompt in prompts.items():
        if len(prompts) > 1 or headings:
            console.print(Text(f"== {name} ==", style="bold"))
        streamer = Running(writer.tokenizer, console.file)
        [answer] = writer.write([name], [prompt], streamer=streamer, criteria=criteria)
        answers[name] = answer
    return answers


def _in_columns(writer: Writer, prompts: dict[str, list[int]], console: Console, criteria: Any) -> dict[str, Answer]:
    columns = Columns(list(prompts), writer.tokenizer, writer.stops, console)
    answers: dict[str, Answer] = {}
    with Live(columns, console=console, refresh_per_second=8):
        for names in writer.together(list(prompts)):
            batch = [prompts[name] for name in names]
            batch_answers = writer.write(names, batch, streamer=columns.rows(names), criteria=criteria)
            for name, answer in zip(names, batch_answers, strict=True):
                answers[name] = answer
                columns.notes[name] = note(answer, writer.sampling.max_new_tokens)
    return {name: answers[name] for name in prompts}
