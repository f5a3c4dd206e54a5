"""The engine: one thread that owns the model and advances all running answers together, a token at a time.

In each step, it first computes parts of the prompts that wait, at most `chunk` tokens in total, and then one token of
every answer. Between two steps, answers join and leave. Answers whose adapters only change activations share a batch,
in which each row has its own adapters. The others (`Adapters.runs_alone`) have a cache and a call of their own.

A learned prompt (prompt tuning, prefix tuning) acts in the first part of a prompt. From then on its positions are in
the cache, so the answer continues as a row without it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.state import BASE
from ..upstream import cache as caches
from ..upstream.calls import parameters
from . import batch
from .adapters import Adapters, unusable
from .errors import Refused
from .sampling import Sampler, Sampling, Token

LOG = logging.getLogger(__name__)
Stack = tuple[str, ...]
"""Names of adapters, innermost first."""


@dataclass(frozen=True)
class End:
    """The end of an answer."""

    reason: str
    """ "stop": an end token; "length": as many tokens as were asked for; "cancelled"."""
    error: Refused | None = None


Sink = Callable[[Token | End], None]
"""Gets the tokens of an answer and then its end. It is called in the engine's thread and must return at once."""


@dataclass(eq=False)
class Answer:
    """A prompt and the answer to it, as far as it is."""

    prompt: Sequence[int]
    names: Stack
    sampling: Sampling
    most: int
    """How many tokens the answer may have."""
    sink: Sink
    deadline: float = float("inf")
    """In seconds of `time.monotonic`."""

    tokens: list[int] = field(default_factory=list)
    is_cancelled: bool = False
    sampler: Sampler | None = None
    stack: Stack = ()
    """The adapters that the next call needs: without learned prompts that are in the cache."""
    is_alone: bool = False
    learned: int = 0
    """Learned positions in front of the prompt."""
    cache: Any = None
    """Its own cache, until it joins the batch."""
    done: int = 0
    """How many tokens of the prompt are in the cache."""
    length: int = 0
    """How many positions of the cache are its own."""

    @property
    def reserved(self) -> int:
        """The positions that it takes in the cache at most."""
        return self.learned + len(self.prompt) + self.most


@dataclass(frozen=True)
class Limits:
    """How much the engine takes on."""

    positions: int
    """Positions in the caches of all running answers."""
    waiting: int = 64
    """Answers in the queue."""
    chunk: int = 256
    """Prompt tokens in one step."""


class Engine:
    """Runs answers in a thread of its own.

    Args:
        adapters: the model with its adapters. After `start`, only the thread may use it.
        stops: the tokens that end an answer.
        limits: how much runs and waits at the same time.
    """

    def __init__(self, adapters: Adapters, stops: Iterable[int], limits: Limits) -> None:
        self.adapters = adapters
        self.stops = frozenset(stops)
        self.limits = limits
        model = adapters.base_model
        self.cache_argument = caches.argument(model)
        self.arguments = parameters(model)
        self.device = model.get_input_embeddings().weight.device
        self.changed = threading.Condition()
        self.is_closing = False
        self.waiting: deque[Answer] = deque()
        self.jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.starting: list[Answer] = []
        """Answers whose prompts are being computed."""
        self.alone: list[Answer] = []
        self.rows: list[Answer] = []
        """The rows of the batch."""
        self.cache: Any = None
        """The cache of the batch; None after rows have left or joined."""
        self.sources: dict[int, batch.Piece] = {}
        """Where the keys of the rows are, by the row's id, while the batch has no cache."""
        self.memo: dict[Any, Any] = {}
        self.thread = threading.Thread(target=self._run, name="veneer-engine", daemon=True)

    # Called from other threads

    def start(self) -> None:
        self.thread.start()

    def submit(self, answers: Sequence[Answer]) -> None:
        """Put answers into the queue: all of them or none.

        Raises:
            Refused: the queue is full, an answer can never fit into the cache, or the engine is closing.
        """
        for answer in answers:
            if answer.reserved > self.limits.positions:
                raise Refused(
                    400,
                    f"the prompt of {len(answer.prompt)} tokens and {answer.most} new tokens exceed the server's cache "
                    f"of {self.limits.positions} positions; ask for fewer (max_tokens)",
                    code="context_length_exceeded",
                    param="max_tokens",
                )
        with self.changed:
            if self.is_closing:
                raise Refused(503, "the server is stopping", retry_after=10)
            if len(self.waiting) + len(answers) > self.limits.waiting:
                raise Refused(
                    429,
                    f"{len(self.waiting)} requests are waiting, and the queue holds {self.limits.waiting}; try again",
                    code="queue_full",
                    retry_after=1,
                )
            self.waiting.extend(answers)
            self.changed.notify()

    def cancel(self, answer: Answer) -> None:
        """End an answer at the next token. Its sink may still get tokens until then."""
        answer.is_cancelled = True
        with self.changed:
            self.changed.notify()

    def call(self, job: Callable[[], Any]) -> Future[Any]:
        """Run a function in the engine's thread, between two steps."""
        future: Future[Any] = Future()
        with self.changed:
            self.jobs.append((job, future))
            self.changed.notify()
        return future

    def close(self, timeout: float | None = None) -> None:
        """Accept no more answers, finish those that run and wait, and end the thread."""
        with self.changed:
            self.is_closing = True
            self.changed.notify()
        self.thread.join(timeout)

    def used(self) -> set[str]:
        """The adapters that running answers need."""
        names: set[str] = set()
        for answer in self.running():
            names.update(answer.names)
        return names

    def positions(self) -> int:
        """The positions that running answers take in the caches at most."""
        return self._positions(self.running())

    # The thread

    def running(self) -> list[Answer]:
        """The answers that are computed now."""
        return [*self.starting, *self.alone, *self.rows]

    def _run(self) -> None:
        torch.set_grad_enabled(False)  # for this thread
        while True:
            with self.changed:
                while not (self.waiting or self.running() or self.jobs or self.is_closing):
                    self.changed.wait()
                is_idle = not (self.waiting or self.running() or self.jobs)
                if self.is_closing and is_idle:
                    return
                answers = [*self.waiting, *self.running()]
            self._guarded(answers, self.step)

    def step(self) -> None:
        """Admit answers, compute parts of prompts, and add one token to every running answer."""
        self._do_jobs()
        self._drop_ended()
        self._admit()
        self._start_prompts()
        for answer in list(self.alone):
            self._guarded([answer], partial(self._advance_alone, answer))
        if self.rows:
            self._guarded(list(self.rows), self._advance_rows)

    def _do_jobs(self) -> None:
        while self.jobs:
            job, future = self.jobs.popleft()
            self.memo = {}
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)

    def _drop_ended(self) -> None:
        """Remove the answers whose client has gone, or that took too long."""
        now = time.monotonic()
        with self.changed:
            waiting = list(self.waiting)
        for answer in [*waiting, *self.running()]:
            if answer.is_cancelled:
                self._end(answer, End("cancelled"))
            elif now > answer.deadline:
                late = Refused(504, "the answer took longer than the server allows", code="timeout")
                self._end(answer, End("cancelled", late))

    def _admit(self) -> None:
        """Move answers from the queue to those that run, in order, as long as memory lasts."""
        while self.waiting:
            answer = self.waiting[0]
            if self._positions([*self.running(), answer]) > self.limits.positions:
                return
            try:
                if not self.adapters.ensure(answer.names, self.used()):
                    return
                self._prepare(answer)
            except Exception as error:
                LOG.error("adapters %s: %s", "+".join(answer.names), error)
                self._end(answer, End("cancelled", unusable("+".join(answer.names))))
                continue
            if self._positions([*self.running(), answer]) > self.limits.positions:  # with its learned positions
                if self.running():
                    return
                self._end(answer, End("cancelled", Refused(400, "the request exceeds the server's cache")))
                continue
            with self.changed:
                self.waiting.remove(answer)
            self.starting.append(answer)

    def _prepare(self, answer: Answer) -> None:
        adapters = self.adapters
        self.memo = {}  # adapters may have been loaded
        answer.is_alone = adapters.runs_alone(answer.names)
        answer.learned = adapters.learned_positions(answer.names)
        answer.stack = answer.names
        answer.sampler = Sampler(answer.sampling, self.device)
        if self.cache_argument is not None and adapters.uses_cache(answer.names):
            answer.cache = caches.new(adapters.base_model, is_encoder_decoder=False)

    def _positions(self, answers: Sequence[Answer]) -> int:
        """The positions of these answers in caches. Rows of the batch are as long as the longest of them."""
        shared = [answer.reserved for answer in answers if not answer.is_alone]
        own = [answer.reserved for answer in answers if answer.is_alone]
        return len(shared) * max(shared, default=0) + sum(own)

    def _guarded(self, answers: Sequence[Answer], work: Callable[[], None]) -> None:
        """Do work for some answers; what goes wrong ends these and no others."""
        try:
            work()
        except Exception as error:
            LOG.exception("a step failed: %s", error)
            for answer in answers:
                self._end(answer, End("cancelled", Refused(500, "the model failed; the server's log says why")))

    def _end(self, answer: Answer, end: End) -> None:
        with self.changed:
            if answer in self.waiting:
                self.waiting.remove(answer)
        for group in (self.starting, self.alone):
            if answer in group:
                group.remove(answer)
        if answer in self.rows:
            self._scatter()
            self.rows.remove(answer)
            self.sources.pop(id(answer), None)
        answer.cache = None
        _send(answer, end)

    # Prompts

    def _start_prompts(self) -> None:
        """Compute at most `chunk` tokens of the prompts that wait, first come, first served."""
        room = self.limits.chunk
        whole = self._startable_together(room)
        if len(whole) > 1:
            self._guarded(whole, partial(self._start_whole, whole))
            return
        for answer in list(self.starting):
            if room <= 0:
                return
            rest = len(answer.prompt) - answer.done
            count = rest if answer.is_alone else min(room, rest)
            room -= count
            self._guarded([answer], partial(self._start_prompt, answer, count))

    def _startable_together(self, room: int) -> list[Answer]:
        """The first answers whose whole prompts, padded to the longest, have at most `room` tokens.

        A call for several short prompts costs little more than one for a single prompt.
        """
        answers: list[Answer] = []
        width = 0
        for answer in self.starting:
            width = max(width, len(answer.prompt))
            if answer.is_alone or answer.done or answer.learned or width * (len(answers) + 1) > room:
                break
            answers.append(answer)
        return sorted(answers, key=lambda answer: answer.stack)

    def _start_whole(self, answers: Sequence[Answer]) -> None:
        """Compute several prompts in one call."""
        lengths = [len(answer.prompt) for answer in answers]
        width = max(lengths)
        ids, positions = [], []
        for answer, length in zip(answers, lengths, strict=True):
            padding = [0] * (width - length)
            ids.append([*padding, *answer.prompt])
            positions.append([*padding, *range(length)])
        cache = caches.new(self.adapters.base_model, is_encoder_decoder=False)
        mask = batch.mask_of(lengths, width, self.device)
        logits = self._forward(answers, ids, cache, positions=positions, mask=mask)
        for row, answer in enumerate(answers):
            answer.done = answer.length = lengths[row]
            self.starting.remove(answer)
            self._join(answer, batch.Piece(cache, row, answer.length))
        self._take(answers, logits)

    def _start_prompt(self, answer: Answer, count: int) -> None:
        if answer.is_alone:
            self.starting.remove(answer)
            self.alone.append(answer)
            self._advance_alone(answer)
            return
        ids = answer.prompt[answer.done : answer.done + count]
        positions = None
        if answer.done:
            positions = [list(range(answer.length, answer.length + count))]
        logits = self._forward([answer], [list(ids)], answer.cache, positions=positions)
        answer.done += count
        answer.length = answer.learned + answer.done
        if answer.done == count:  # learned prompts are in the cache now
            prompts = self.adapters.prompts(answer.names)
            answer.stack = tuple(name for name in answer.names if name not in prompts)
        if answer.done < len(answer.prompt):
            return
        self.starting.remove(answer)
        self._join(answer, batch.Piece(answer.cache, 0, answer.length))
        self._take([answer], logits)

    # Answers

    def _advance_alone(self, answer: Answer) -> None:
        """One token of an answer that has a call of its own, as in `generate`."""
        known = [*answer.prompt, *answer.tokens]
        start = answer.done if answer.cache is not None else 0
        positions = [list(range(start, len(known)))]
        mask = torch.ones(1, len(known), dtype=torch.long, device=self.device)
        logits = self._forward([answer], [known[start:]], answer.cache, positions=positions, mask=mask)
        answer.done = len(known)
        self._take([answer], logits)

    def _join(self, answer: Answer, piece: batch.Piece) -> None:
        """Make an answer a row of the batch, next to the rows with the same adapters."""
        self._scatter()
        self.sources[id(answer)] = piece
        answer.cache = None
        self.rows.append(answer)
        self.rows.sort(key=lambda row: row.stack)

    def _scatter(self) -> None:
        """Note where the keys of each row are, because the rows are about to change."""
        if self.cache is not None:
            for place, row in enumerate(self.rows):
                self.sources[id(row)] = batch.Piece(self.cache, place, row.length)
            self.cache = None
        self.memo = {}

    def _gather(self) -> None:
        """Make a cache of the rows, if they have changed."""
        if self.cache is None:
            pieces = [self.sources[id(row)] for row in self.rows]
            is_one = len(pieces) == 1 and caches.length(pieces[0].cache) == pieces[0].length
            is_one = is_one and len(caches.pairs(pieces[0].cache)[0][0]) == 1
            self.cache = pieces[0].cache if is_one else batch.joined(self.adapters.base_model, pieces)
            self.sources = {}

    def _advance_rows(self) -> None:
        """One token of every answer in the batch."""
        self._gather()
        rows = list(self.rows)
        ids = [[row.tokens[-1]] for row in rows]
        positions = [[row.length] for row in rows]
        lengths = [row.length + 1 for row in rows]
        mask = batch.mask_of(lengths, max(lengths), self.device)
        logits = self._forward(rows, ids, self.cache, positions=positions, mask=mask, memo=self.memo)
        for row in rows:
            row.length += 1
        self._take(rows, logits)

    def _forward(
        self,
        answers: Sequence[Answer],
        ids: list[list[int]],
        cache: Any,
        *,
        positions: list[list[int]] | None = None,
        mask: Tensor | None = None,
        memo: dict[Any, Any] | None = None,
    ) -> Tensor:
        """The logits (rows, vocabulary) in fp32 for the last of the ids (rows, tokens) of each answer."""
        arguments: dict[str, Any] = {"input_ids": torch.tensor(ids, device=self.device)}
        if mask is not None and "attention_mask" in self.arguments:
            arguments["attention_mask"] = mask
        if positions is not None and "position_ids" in self.arguments:
            arguments["position_ids"] = torch.tensor(positions, device=self.device)
        if "logits_to_keep" in self.arguments:
            arguments["logits_to_keep"] = 1
        if self.cache_argument is not None:
            arguments["use_cache"] = cache is not None
        if cache is not None:
            arguments = caches.with_cache(arguments, self.cache_argument, cache)
        with self._adapted([answer.stack for answer in answers], memo):
            output = self.adapters.model(**arguments)
        return output.logits[:, -1].float()

    @contextmanager
    def _adapted(self, stacks: Sequence[Stack], memo: dict[Any, Any] | None) -> Iterator[None]:
        """In the block, each row of a call has its own adapters."""
        state = self.adapters.state
        if state is None:
            yield
            return
        first = stacks[0]
        if all(stack == first for stack in stacks):
            with state.running(first), state.remembering({}, memo):
                yield
            return
        names = [stack or BASE for stack in stacks]
        with state.running(()), state.remembering({"adapter_names": names}, memo):
            yield

    def _take(self, answers: Sequence[Answer], logits: Tensor) -> None:
        """Choose the next token of each answer from its logits."""
        likeliest = logits.argmax(-1).tolist()
        finite = torch.isfinite(logits.sum(-1)).tolist()
        for place, answer in enumerate(answers):
            if not finite[place]:
                LOG.error("the logits of %s are not finite", "+".join(answer.names) or self.adapters.base)
                self._end(answer, End("cancelled", Refused(500, "the model's output is not finite")))
                continue
            assert answer.sampler is not None
            token = answer.sampler.choose(logits[place], likeliest[place])
            if token.id in self.stops:
                self._end(answer, End("stop"))
                continue
            answer.tokens.append(token.id)
            _send(answer, token)
            if len(answer.tokens) >= answer.most:
                self._end(answer, End("length"))


def _send(answer: Answer, event: Token | End) -> None:
    try:
        answer.sink(event)
    except Exception:  # the event loop of the client has closed
        answer.is_cancelled = True
