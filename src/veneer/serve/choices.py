"""Answers as a client sees them: text that grows, tokens with their log-probabilities, and a reason for the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .engine import Answer, End, Engine
from .errors import Refused
from .metrics import Metrics
from .sampling import Sampling, Token
from .text import Text, begun
from .tools import Call, Form


@dataclass(frozen=True)
class Piece:
    """What one token, or the end, adds to an answer."""

    index: int
    """Which of the request's answers it is."""
    text: str = ""
    token: Token | None = None
    calls: Sequence[Call] = ()
    reason: str | None = None
    """Why the answer ends here: "stop", "length" or "tool_calls"; None: it goes on."""


@dataclass
class Job:
    """What a request asks of the engine."""

    prompts: Sequence[Sequence[int]]
    names: tuple[str, ...]
    sampling: Sampling
    most: int
    n: int = 1
    """How many answers to each prompt."""
    stops: Sequence[str] = ()
    tools: Form | None = None
    """How the answer may call tools; None: it cannot."""


@dataclass
class Choices:
    """The answers to one request, which run in the engine from the beginning.

    Raises:
        Refused: the engine does not accept them.
    """

    engine: Engine
    metrics: Metrics
    tokenizer: Any
    job: Job
    seconds: float
    """How long they may take."""
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[int, Token | End]] = asyncio.Queue()
        self.begun = time.monotonic()
        seed = self.job.sampling.seed
        for prompt in self.job.prompts:
            for number in range(self.job.n):
                sampling = self.job.sampling
                if seed is not None and number:
                    sampling = Sampling(**{**sampling.__dict__, "seed": seed + number})
                sink = self._sink(len(self.answers))
                deadline = self.begun + self.seconds
                self.answers.append(Answer(prompt, self.job.names, sampling, self.job.most, sink, deadline))
        self.engine.submit(self.answers)

    def _sink(self, index: int) -> Callable[[Token | End], None]:
        def send(event: Token | End) -> None:
            self.loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

        return send

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.job.prompts))

    @property
    def generated(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all answers, as they come. Leaving early ends the answers.

        Raises:
            Refused: the engine could not finish an answer.
        """
        texts = [self._text() for _ in self.answers]
        open_ones = set(range(len(self.answers)))
        is_first = True
        try:
            while open_ones:
                index, event = await self.events.get()
                if index not in open_ones:
                    continue
                if is_first and isinstance(event, Token):
                    is_first = False
                    self.metrics.first.observe(time.monotonic() - self.begun)
                piece = _piece(index, event, texts[index])
                if piece.reason is not None:
                    open_ones.remove(index)
                    self.engine.cancel(self.answers[index])
                yield piece
        finally:
            for answer in self.answers:
                self.engine.cancel(answer)
            self.metrics.prompt_tokens.inc(self.prompt_tokens)
            self.metrics.tokens.inc(self.generated)
            self.metrics.whole.observe(time.monotonic() - self.begun)

    def _text(self) -> Text | TextWithCalls:
        if self.job.tools is None:
            return Text(self.tokenizer, self.job.stops)
        return TextWithCalls(Text(self.tokenizer, self.job.stops, keep_special=True), self.job.tools)


class TextWithCalls:
    """The text of an answer that may call tools: from where a call may begin, it is kept until the end."""

    def __init__(self, text: Text, form: Form) -> None:
        self.text = text
        self.form = form
        self.held = ""
        self.calls: list[Call] = []

    @property
    def is_stopped(self) -> bool:
        return self.text.is_stopped

    def push(self, token: int) -> str:
        self.held += self.text.push(token)
        words, opening, _ = self.held.partition(self.form.opening)
        if not opening:
            words = words[: len(words) - begun(words, self.form.opening)]
        certain = words.rstrip()  # space before a call is not part of the words
        self.held = self.held[len(certain) :]
        return certain

    def finish(self) -> str:
        words, self.calls = self.form.find(self.held + self.text.finish())
        self.held = ""
        return words


def _piece(index: int, event: Token | End, text: Text | TextWithCalls) -> Piece:
    if isinstance(event, Token):
        words = text.push(event.id)
        if not text.is_stopped:
            return Piece(index, words, event)
        return _last(index, words, "stop", text, event)
    if event.error is not None:
        raise event.error
    if event.reason == "cancelled":
        raise Refused(503, "the answer was cancelled")
    return _last(index, "", event.reason, text, None)


def _last(index: int, words: str, reason: str, text: Text | TextWithCalls, token: Token | None) -> Piece:
    words += text.finish()
    calls = text.calls if isinstance(text, TextWithCalls) else []
    return Piece(index, words, token, calls, "tool_calls" if calls else reason)
