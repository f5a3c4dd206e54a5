"""Facts about an epoch over the data: tokens, lengths, rows cut or dropped, and optimizer steps."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ..data.collate import Shuffled
from ..data.encode import Account
from ..data.preferences import tokens_of
from ..data.prepare import prepare
from ..train.recipe import Recipe
from ..train.setup import facts_of, load_tokenizer, within_positions

BINS = 10
"""Approximate number of bars in the histogram."""
COUNTED = ("rows", "kept", "tokens", "supervised_tokens", "cut_rows", "cut_tokens", "too_long_rows", "unlearned_rows")
"""Fields of `Epoch` that are copied from the account of the data."""


@dataclass(frozen=True)
class Epoch:
    """Facts about a recipe's data; not available for streaming data."""

    rows: int
    """Rows read."""
    kept: int
    """Rows with at least one token to learn, including those held out for evaluation."""
    tokens: int
    supervised_tokens: int
    cut_rows: int
    cut_tokens: int
    too_long_rows: int
    unlearned_rows: int
    longest: int
    """Tokens of the longest row, before cutting."""
    lengths: tuple[tuple[int, int, int], ...]
    """(first, last, rows): the number of rows with first to last tokens, before cutting."""
    sequences: int
    """Sequences per epoch: training rows, repeated by their weight, and packed if the recipe says so."""
    steps: int
    """Optimizer steps per epoch on one process."""
    evaluation_rows: int
    largest_batch: int
    """Tokens of the largest batch in the first epoch, without padding."""
    warnings: tuple[str, ...]
    """What training says about rows that are cut, dropped or unusual."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def epoch_of(recipe: Recipe) -> Epoch:
    """Read and encode a recipe's data as training does.

    Raises:
        DataError: there is nothing to train on, or the data cannot be read.
    """
    recipe = within_positions(recipe)
    data = prepare(recipe, load_tokenizer(recipe), facts_of(recipe))
    account = data.account
    counts = {name: getattr(account, name) for name in COUNTED}
    train_lengths = [tokens_of(row) for row in data.train]
    return Epoch(
        **counts,
        longest=max(account.lengths),
        lengths=histogram(account),
        sequences=len(train_lengths),
        steps=math.ceil(len(train_lengths) / (recipe.batch_size * recipe.accumulate)),
        evaluation_rows=len(data.evaluation or ()),
        largest_batch=_largest_batch(train_lengths, recipe),
        warnings=tuple(account.warnings(recipe.max_length)),
    )


def _largest_batch(lengths: list[int], recipe: Recipe) -> int:
    """Tokens of the largest batch, with rows in the order of training."""
    shuffled = [lengths[i] for i in Shuffled(len(lengths), recipe.seed, 1)]
    batches = []
    for start in range(0, len(shuffled), recipe.batch_size):
        batch = shuffled[start : start + recipe.batch_size]
        batches.append(sum(batch))
    return max(batches)


def histogram(account: Account) -> tuple[tuple[int, int, int], ...]:
    """(first, last, rows) for bars of equal width, a round number, from the shortest row to the longest."""
    first = min(account.lengths)
    last = max(account.lengths)
    least_width = math.ceil((last - first + 1) / BINS)
    width = _round_up(least_width)
    counts: Counter[int] = Counter()
    for length, rows in account.lengths.items():
        counts[length // width] += rows
    bars = []
    for bar in range(first // width, last // width + 1):
        start = bar * width
        bars.append((start, start + width - 1, counts[bar]))
    return tuple(bars)


def _round_up(width: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 ... that is at least `width`."""
    scale = 10 ** int(math.log10(width))
    return next(scale * step for step in (1, 2, 5, 10) if scale * step >= width)
