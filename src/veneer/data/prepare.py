"""Prepare the data of a run: read the recipe's sources, encode, split, weight and pack them."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, Protocol, TypeVar

from ..errors import ConfigError, DataError
from .encode import EMPTY, Account, Encoded, Encoder, Seen
from .packing import pack
from .preferences import PairEncoder, preferences
from .shapes import Example, shape_of, understand
from .sources import Source, rows

Row = TypeVar("Row")
SHUFFLED = 1000
"""Size of the buffer in which streamed rows are shuffled."""


class Request(Protocol):
    """The keys of a recipe that are read here; `train.recipe.Recipe` documents them."""

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

    @property
    def reads_pairs(self) -> bool:
        """Whether each row has a chosen and a rejected answer."""


@dataclass
class Data:
    """Encoded rows for training and evaluation, with counts of what was cut or dropped."""

    train: Any
    """A list of encoded rows or pairs; an iterable dataset when streaming."""
    evaluation: list[Encoded] | None
    labels: list[str] | None
    """The classes, for classification."""
    account: Account
    eval_account: Account | None
    fingerprint: str | None
    """A hash of the rows; None when streaming."""
    first: list[Seen]
    """The first rows read, before and after the length limit."""


def prepare(recipe: Request, tokenizer: Any, facts: tuple[str, ...] = ()) -> Data:
    """Read, encode, split, weight and pack the data of a recipe.

    Args:
        facts: integer columns that the method reads per row, if the rows have them.

    Raises:
        DataError: there is nothing to train on, or the data cannot be read.
    """
    if recipe.streaming:
        return _streamed(recipe, tokenizer, facts)
    sources = [list(_read(source, recipe, facts)) for source in recipe.data]
    eval_examples = list(chain.from_iterable(_read(source, recipe, facts) for source in recipe.eval_data))
    labels = None if recipe.reads_pairs else labels_among(recipe, [*chain.from_iterable(sources), *eval_examples])
    encoder = encoder_of(recipe, tokenizer, labels)
    encoded = [list(encoder.encode(source)) for source in sources]
    evaluation = None
    eval_account = None
    if eval_examples:
        eval_encoder = encoder_of(recipe, tokenizer, labels)
        evaluation = list(eval_encoder.encode(eval_examples))
        eval_account = eval_encoder.account
    check_learned(encoder.account, "the data")
    if eval_account is not None:
        check_learned(eval_account, "the evaluation data")
    generator = random.Random(recipe.seed)
    if recipe.eval_split is not None:
        encoded, evaluation = split(encoded, recipe.eval_split, generator)
    train = _mixed(recipe, encoded, generator)
    return Data(train, evaluation, labels, encoder.account, eval_account, _fingerprint(train), encoder.first)


def _mixed(recipe: Request, encoded: list[list[Encoded]], generator: random.Random) -> list[Encoded]:
    """The training rows of all sources by weight, packed if the recipe says so."""
    train: list[Encoded] = []
    for source, source_rows in zip(recipe.data, encoded, strict=True):
        train += _weighted(source_rows, source, generator)
    if not recipe.packing:
        return train
    generator.shuffle(train)
    return pack(train, recipe.max_length)


def _read(source: Source, recipe: Request, facts: tuple[str, ...]) -> Iterator[Any]:
    """The rows of a source as `Example`s, or as `Pair`s."""
    if recipe.reads_pairs:
        return preferences(source, facts)
    return examples(source, recipe.task, facts)


def examples(source: Source, task: str = "auto", facts: tuple[str, ...] = ()) -> Iterator[Example]:
    """Yield the rows of a source as examples, all in the shape of its first row."""
    shape = None
    for place, row in rows(source):
        shape = shape or shape_of(place, row, task)
        yield understand(place, row, shape, facts)
    if shape is None:
        raise DataError(f"{source.path!r} holds no rows")


def is_classification(recipe: Request) -> bool:
    """Whether the recipe trains a classifier: by its task, or else by the first row of its data."""
    if recipe.reads_pairs:
        return False
    if recipe.task != "auto":
        return recipe.task == "classification"
    first = next(examples(recipe.data[0]))
    return first.label is not None


def labels_among(recipe: Request, every: Sequence[Example]) -> list[str] | None:
    """The classes in order: the recipe's, or those in the data, sorted with numbers first. None without classes."""
    kinds = {example.label is not None for example in every}
    if kinds == {False}:
        return None
    if len(kinds) > 1:
        first = every[0]
        other = next(e for e in every if (e.label is None) != (first.label is None))
        raise DataError(
            f"{first.place} and {other.place} differ: one has a label, the other does not; a run trains for one task"
        )
    labels = recipe.labels or sorted({str(example.label) for example in every}, key=_label_order)
    if len(labels) < 2:
        raise DataError(f"all rows are of the class {labels[0]!r}; a classifier needs two classes or more")
    return labels


def _label_order(name: str) -> tuple[bool, int, str]:
    """Sort key of a class: numbers by value, then names by letter."""
    is_number = name.isascii() and name.isdecimal() and len(name) <= 18
    value = int(name) if is_number else 0
    return not is_number, value, name


def encoder_of(recipe: Request, tokenizer: Any, labels: list[str] | None) -> Encoder | PairEncoder:
    """The encoder for the rows of a recipe."""
    if recipe.reads_pairs and recipe.packing:
        raise ConfigError("packing puts several rows into one sequence; pairs are compared with each other: set it off")
    if labels is not None and recipe.packing:
        raise ConfigError("packing puts several rows into one sequence, which has one class; set packing off")
    encoder = Encoder(
        tokenizer,
        recipe.max_length,
        long_rows=recipe.long_rows,
        loss_on=recipe.loss_on,
        template_file=recipe.chat_template,
        labels=labels,
    )
    return PairEncoder(encoder) if recipe.reads_pairs else encoder


def check_learned(account: Account, what: str) -> None:
    """Raise unless a row was kept."""
    empty = account.notes.get(EMPTY)
    if empty is not None and empty.rows == account.rows:
        raise DataError(f"all {account.rows} rows of {what} have an empty answer (the first: {empty.places[0]})")
    if account.kept:
        return
    if account.too_long_rows:
        raise DataError(
            f"all {account.rows} rows of {what} are dropped: {account.too_long_rows} are too long for max_length"
        )
    if account.notes and not account.unlearned_rows:
        raise DataError(f"no row of {what} can be learned from: {'; '.join(account.remarks())}")
    raise DataError(
        f"all labels are masked: none of the {account.rows} rows of {what} has a token to learn "
        f"({account.cut_rows} were cut to max_length); check that the data has answers, and that max_length has room "
        "for them"
    )


def split(encoded: list[list[Row]], wanted: float, generator: random.Random) -> tuple[list[list[Row]], list[Row]]:
    """(training rows by source, evaluation rows), the latter drawn at random from all sources."""
    places: list[tuple[int, int]] = []
    for source, source_rows in enumerate(encoded):
        places += [(source, i) for i in range(len(source_rows))]
    count = round(wanted * len(places)) if wanted < 1 else int(wanted)
    if not 0 < count < len(places):
        raise DataError(f"eval_split = {wanted:g} takes {count} of {len(places)} rows; both parts need at least one")
    taken = set(generator.sample(places, count))
    train: list[list[Row]] = [[] for _ in encoded]
    evaluation: list[Row] = []
    for source, i in places:
        rows_of_part = evaluation if (source, i) in taken else train[source]
        rows_of_part.append(encoded[source][i])
    return train, evaluation


def _weighted(source_rows: list[Encoded], source: Source, generator: random.Random) -> list[Encoded]:
    """The rows repeated by the integer part of the weight, and a random share of them by its fraction."""
    whole = math.floor(source.weight)
    extra = round((source.weight - whole) * len(source_rows))
    weighted = source_rows * whole
    if extra:
        weighted += generator.sample(source_rows, extra)
    return weighted


def _fingerprint(encoded: Sequence[Encoded]) -> str:
    """A hash of all rows in order."""
    digest = hashlib.sha256()
    for row in encoded:
        digest.update(repr(sorted(row.items())).encode())
    return digest.hexdigest()


def _streamed(recipe: Request, tokenizer: Any, facts: tuple[str, ...]) -> Data:
    """The data of a recipe as a stream that is encoded while it is read."""
    from datasets import IterableDataset, interleave_datasets

    if recipe.packing:
        raise ConfigError("packing needs all rows at once; set packing or streaming off")
    labels = None
    if is_classification(recipe):
        labels = recipe.labels
        if labels is None:
            raise ConfigError("the classes of streaming data are not known in advance; give labels")
    encoder = encoder_of(recipe, tokenizer, labels)

    def stream(source: Source) -> Iterator[Encoded]:
        yield from encoder.encode(_read(source, recipe, facts))

    if next(stream(recipe.data[0]), None) is None:
        check_learned(encoder.account, "the data")
    encoder.account = Account()
    encoder.first.clear()
    parts = [IterableDataset.from_generator(stream, gen_kwargs={"source": source}) for source in recipe.data]
    total_weight = sum(source.weight for source in recipe.data)
    shares = [source.weight / total_weight for source in recipe.data]
    mixed = interleave_datasets(parts, shares, seed=recipe.seed, stopping_strategy="all_exhausted")
    train = mixed.shuffle(seed=recipe.seed, buffer_size=SHUFFLED)
    evaluation = None
    eval_account = None
    if recipe.eval_data:
        eval_encoder = encoder_of(recipe, tokenizer, labels)
        eval_examples = chain.from_iterable(_read(source, recipe, facts) for source in recipe.eval_data)
        evaluation = list(eval_encoder.encode(eval_examples)) or None
        eval_account = eval_encoder.account
    return Data(train, evaluation, labels, encoder.account, eval_account, None, encoder.first)
