"""Answers shown while they are written: one as running text, several in columns."""

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
"""A column of fewer characters is hard to read; the answers then stand one below the other."""
COLOURS = ("white", "cyan", "magenta", "yellow", "green", "blue")


class Running(TextStreamer):
    """One answer, word by word, to a file."""

    def __init__(self, tokenizer: Any, to: IO[str] | None = None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.to = to or sys.stdout

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, file=self.to, flush=True, end="\n" if stream_end else "")


class Columns:
    """Several answers side by side on a terminal, each growing in a column of its own."""

    def __init__(self, names: Sequence[str], tokenizer: Any, stops: set[int], console: Console) -> None:
        self.tokenizer, self.stops, self.console = tokenizer, stops, console
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
        text = self.tokenizer.decode(self.tokens[name], skip_special_tokens=True).removesuffix("\ufffd")
        note = self.notes.get(name)
        return Panel(Text(text), title=Text(name, style=f"bold {colour}"), subtitle=note, border_style=colour)


class Rows(BaseStreamer):
    """The tokens of a batch, dealt out to columns."""

    def __init__(self, columns: Columns, names: Sequence[str]) -> None:
        self.columns, self.names = columns, names
        self.done = [False] * len(names)
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """The prompts, (batch, length), and then (batch,) at each step."""
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
    """Ctrl-C ends the answer under way; a second one ends what is around it."""

    def __init__(self) -> None:
        self.wanted = False

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.wanted, dtype=torch.bool, device=input_ids.device)

    @contextmanager
    def listening(self) -> Any:
        """Inside, Ctrl-C sets `wanted`."""
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
    return f"cut at {most} tokens" if answer.tokens >= most else f"stopped after {answer.tokens} tokens"


def show(
    writer: Writer,
    prompts: dict[str, list[int]],
    console: Console,
    *,
    criteria: Any = None,
    headings: bool = True,
) -> dict[str, Answer]:
    """Write the answers of several and show them as they come: in columns on a terminal, else one after the other.

    Args:
        prompts: what each of them answers, by name.
        console: of the place where answers go.
        headings: say whose answer it is also where there is one alone.
    """
    if len(prompts) > 1 and console.is_terminal:
        return _in_columns(writer, prompts, console, criteria)
    found: dict[str, Answer] = {}
    for name, prompt in prompts.items():
        if len(prompts) > 1 or headings:
            console.print(Text(f"== {name} ==", style="bold"))
        streamer = Running(writer.tokenizer, console.file)
        found[name] = writer.write([name], [prompt], streamer=streamer, criteria=criteria)[0]
    return found


def _in_columns(writer: Writer, prompts: dict[str, list[int]], console: Console, criteria: Any) -> dict[str, Answer]:
    columns = Columns(list(prompts), writer.tokenizer, writer.stops, console)
    found: dict[str, Answer] = {}
    with Live(columns, console=console, refresh_per_second=8):
        for names in writer.together(list(prompts)):
            rows = [prompts[name] for name in names]
            answers = writer.write(names, rows, streamer=columns.rows(names), criteria=criteria)
            for name, answer in zip(names, answers, strict=True):
                found[name] = answer
                columns.notes[name] = note(answer, writer.sampling.max_new_tokens)
    return {name: found[name] for name in prompts}
