"""From the recipe's sources to what a run trains and evaluates on."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..errors import ConfigError, DataError
from .encode import Account, Encoded, Encoder
from .packing import pack
from .shapes import Example, shape_of, understand
from .sources import Source, rows

SHUFFLED = 1000
"""Rows among which streamed ones are shuffled."""


class Request(Protocol):
    """What is asked of data: the keys of a recipe that are read here (`train.recipe.Recipe` explains each)."""

    data: list[Source]
    eval_data: list[Source]
    eval_split: float | None
    task: Literal["auto", "text", "classification"]
    labels: list[str] | None
    loss_on: Literal["assistant", "all"]
    chat_template: str | None
    max_length: int
    long_rows: Literal["cut", "drop"]
    packing: bool
    streaming: bool
    seed: int


@dataclass
class Data:
    """Encoded rows and the account of how they came to be."""

    train: Any
    """A list of encoded rows; an iterable dataset when streaming."""
    evaluation: list[Encoded] | None
    labels: list[str] | None
    """The classes, for classification."""
    account: Account
    eval_account: Account | None
    fingerprint: str | None
    """A hash of the rows; None when streaming."""


def prepare(recipe: Request, tokenizer: Any, facts: tuple[str, ...] = ()) -> Data:
    """Read, encode, split, weigh and pack.

    Args:
        facts: columns of integers that the method wants to know of each row, where they are there.

    Raises:
        DataError: there is nothing to train on, or it cannot be read.
    """
    if recipe.streaming:
        return _streamed(recipe, tokenizer, facts)
    sources = [list(examples(source, recipe.task, facts)) for source in recipe.data]
    held = [e for source in recipe.eval_data for e in examples(source, recipe.task, facts)]
    every = [example for source in sources for example in source]
    labels = _labels(recipe, [*every, *held])
    encoder, eval_encoder = _encoder(recipe, tokenizer, labels), _encoder(recipe, tokenizer, labels)
    encoded = [list(encoder.encode(source)) for source in sources]
    evaluation = list(eval_encoder.encode(held)) if held else None
    _check_learned(encoder.account, "the data")
    if held:
        _check_learned(eval_encoder.account, "the evaluation data")
    draw = random.Random(recipe.seed)
    if recipe.eval_split is not None:
        encoded, evaluation = _split(encoded, recipe.eval_split, draw)
    train = [row for source, own in zip(recipe.data, encoded, strict=True) for row in _weighed(own, source, draw)]
    if recipe.packing:
        draw.shuffle(train)
        train = pack(train, recipe.max_length)
    account = eval_encoder.account if held else None
    return Data(train, evaluation, labels, encoder.account, account, _fingerprint(train))


def examples(source: Source, task: str = "auto", facts: tuple[str, ...] = ()) -> Iterator[Example]:
    """The rows of a source, all of the shape of its first."""
    shape = None
    for place, row in rows(source):
        shape = shape or shape_of(place, row, task)
        yield understand(place, row, shape, facts)
    if shape is None:
        raise DataError(f"{source.path!r} holds no rows")


def is_classification(recipe: Request) -> bool:
    """Whether the recipe's data has classes, by its first row."""
    if recipe.task != "auto":
        return recipe.task == "classification"
    return next(examples(recipe.data[0])).label is not None


def _labels(recipe: Request, every: Sequence[Example]) -> list[str] | None:
    """The classes in order: the recipe's, or those in the data, numbers by value."""
    kinds = {example.label is not None for example in every}
    if kinds == {False}:
        return None
    if len(kinds) > 1:
        other = next(e.place for e in every if (e.label is None) != (every[0].label is None))
        raise DataError(f"{every[0].place} and {other} differ: one has a label, the other none; a run learns one task")
    found = {str(example.label) for example in every}
    labels = recipe.labels or sorted(
        found, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)
    )
    if len(labels) < 2:
        raise DataError(f"all rows are of the class {labels[0]!r}; a classifier needs two classes or more")
    return labels


def _encoder(recipe: Request, tokenizer: Any, labels: list[str] | None) -> Encoder:
    if labels is not None and recipe.packing:
        raise ConfigError("packing puts several rows into one sequence, which has one class; set packing off")
    return Encoder(
        tokenizer,
        recipe.max_length,
        long_rows=recipe.long_rows,
        loss_on=recipe.loss_on,
        template_file=recipe.chat_template,
        labels=labels,
    )


def _check_learned(account: Account, what: str) -> None:
    if account.kept:
        return
    if account.too_long_rows:
        raise DataError(
            f"all {account.rows} rows of {what} are dropped: {account.too_long_rows} are too long for max_length"
        )
    raise DataError(
        f"all labels are masked: none of the {account.rows} rows of {what} has a token to learn "
        f"({account.cut_rows} were cut to max_length); is there an answer in the data, and room for it?"
    )


def _split(
    encoded: list[list[Encoded]], wanted: float, draw: random.Random
) -> tuple[list[list[Encoded]], list[Encoded]]:
    """Take rows out for evaluation, at random over all sources."""
    places = [(s, i) for s, own in enumerate(encoded) for i in range(len(own))]
    count = round(wanted * len(places)) if wanted < 1 else int(wanted)
    if not 0 < count < len(places):
        raise DataError(f"eval_split = {wanted:g} takes {count} of {len(places)} rows; both parts need some")
    taken = set(draw.sample(places, count))
    kept = [[row for i, row in enumerate(own) if (s, i) not in taken] for s, own in enumerate(encoded)]
    return kept, [encoded[s][i] for s, i in places if (s, i) in taken]


def _weighed(own: list[Encoded], source: Source, draw: random.Random) -> list[Encoded]:
    """Each row as often as the weight says, the fraction of it for a random part of the rows."""
    whole = math.floor(source.weight)
    extra = round((source.weight - whole) * len(own))
    return own * whole + (draw.sample(own, extra) if extra else [])


def _fingerprint(encoded: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for row in encoded:
        digest.update(repr(sorted(row.items())).encode())
    return digest.hexdigest()


def _streamed(recipe: Request, tokenizer: Any, facts: tuple[str, ...]) -> Data:
    from datasets import IterableDataset, interleave_datasets

    if recipe.packing:
        raise ConfigError("packing needs all rows at once; set packing or streaming off")
    classifies = is_classification(recipe)
    if classifies and recipe.labels is None:
        raise ConfigError("streaming data shows its classes too late; give labels")
    encoder, held = _encoder(recipe, tokenizer, recipe.labels if classifies else None), recipe.eval_data
    eval_encoder = _encoder(recipe, tokenizer, recipe.labels if classifies else None)

    def stream(source: Source) -> Iterator[Encoded]:
        yield from encoder.encode(examples(source, recipe.task, facts))

    if next(stream(recipe.data[0]), None) is None:
        _check_learned(encoder.account, "the data")
    encoder.account = Account()
    parts = [IterableDataset.from_generator(stream, gen_kwargs={"source": source}) for source in recipe.data]
    shares = [source.weight / sum(s.weight for s in recipe.data) for source in recipe.data]
    mixed = interleave_datasets(parts, shares, seed=recipe.seed, stopping_strategy="all_exhausted")
    evaluation = [row for s in held for row in eval_encoder.encode(examples(s, recipe.task, facts))] or None
    train = mixed.shuffle(seed=recipe.seed, buffer_size=SHUFFLED)
    account = eval_encoder.account if held else None
    return Data(train, evaluation, recipe.labels if classifies else None, encoder.account, account, None)
