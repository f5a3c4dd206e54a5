"""What an epoch over the data takes: tokens, lengths, what the length limit cuts, optimizer steps."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ..data.collate import Shuffled
from ..data.encode import Account
from ..data.prepare import prepare
from ..train.recipe import Recipe
from ..train.setup import facts_of, load_tokenizer

BINS = 10
"""Bars of the histogram, about."""
COUNTED = ("rows", "kept", "tokens", "supervised_tokens", "cut_rows", "cut_tokens", "too_long_rows", "unlearned_rows")
"""What is taken over from the account."""


@dataclass(frozen=True)
class Epoch:
    """Data facts under a recipe. Of streaming data there are none."""

    rows: int
    """Rows read."""
    kept: int
    """Rows that something is learned from, those for evaluation among them."""
    tokens: int
    supervised_tokens: int
    cut_rows: int
    cut_tokens: int
    too_long_rows: int
    unlearned_rows: int
    longest: int
    """Tokens of the longest row, before cutting."""
    lengths: tuple[tuple[int, int, int], ...]
    """(first, last, rows): how many rows have so many tokens, before cutting."""
    sequences: int
    """Sequences of an epoch: training rows by their weights, packed where that is asked for."""
    steps: int
    """Optimizer steps of an epoch, on one process."""
    evaluation_rows: int
    largest_batch: int
    """Tokens of the largest batch of the first epoch, without padding."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def epoch_of(recipe: Recipe) -> Epoch:
    """Read and encode a recipe's data, as training would.

    Raises:
        DataError: there is nothing to train on, or it cannot be read.
    """
    data = prepare(recipe, load_tokenizer(recipe), facts_of(recipe))
    account = data.account
    return Epoch(
        **{name: getattr(account, name) for name in COUNTED},
        longest=max(account.lengths),
        lengths=histogram(account),
        sequences=len(data.train),
        steps=math.ceil(len(data.train) / (recipe.batch_size * recipe.accumulate)),
        evaluation_rows=len(data.evaluation or ()),
        largest_batch=_largest_batch([len(row["input_ids"]) for row in data.train], recipe),
    )


def _largest_batch(lengths: list[int], recipe: Recipe) -> int:
    """In the order that training takes rows in."""
    order = [lengths[i] for i in Shuffled(len(lengths), recipe.seed, 1)]
    return max(sum(order[i : i + recipe.batch_size]) for i in range(0, len(order), recipe.batch_size))


def histogram(account: Account) -> tuple[tuple[int, int, int], ...]:
    """Bars of one width, a round number, from the shortest row to the longest."""
    first, last = min(account.lengths), max(account.lengths)
    width = _round_up(max(1, math.ceil((last - first + 1) / BINS)))
    counts: Counter[int] = Counter()
    for length, rows in account.lengths.items():
        counts[length // width] += rows
    return tuple((b * width, (b + 1) * width - 1, counts[b]) for b in range(first // width, last // width + 1))


def _round_up(width: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50 ..."""
    scale = 10 ** int(math.log10(width))
    return next(scale * step for step in (1, 2, 5, 10) if scale * step >= width)
