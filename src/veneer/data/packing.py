"""Packing: several rows in one sequence, for less padding. Position ids restart at each row and keep rows apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TrainingError
from ..ops import is_fast
from ..ops.attention import by_sequence, keeps_apart
from ..targets.modules import evaluating
from .encode import IGNORED, Encoded

ONE_ROW = {"input_ids", "labels", "position_ids"}
"""Keys of a row that can be concatenated. Any other key describes its row as a whole."""
OPEN = 64
"""Maximum number of sequences that are being filled at a time."""
BEGINNING = 16
"""The number of tokens of a row in the trial whether packed rows affect each other."""


@dataclass(eq=False)
class _Sequence:
    """Rows that go into one sequence, and the number of their tokens."""

    used: int
    rows: list[Encoded]


def pack(rows: Sequence[Encoded], length: int) -> list[Encoded]:
    """Join rows to sequences of at most `length` tokens. Each row goes to the fullest sequence with room for it.

    The first token of a row is not learned, because no token of its row predicts it.
    """
    full: list[_Sequence] = []
    filling: list[_Sequence] = []
    for row in rows:
        size = len(row["input_ids"])
        fitting = [sequence for sequence in filling if sequence.used + size <= length]
        if fitting:
            sequence = max(fitting, key=_used)
            sequence.used += size
            sequence.rows.append(row)
        else:
            filling.append(_Sequence(size, [row]))
        if len(filling) > OPEN:
            fullest = max(filling, key=_used)
            filling.remove(fullest)
            full.append(fullest)
    return [joined(sequence.rows) for sequence in full + filling]


def _used(sequence: _Sequence) -> int:
    return sequence.used


def joined(rows: Sequence[Encoded]) -> Encoded:
    """Several rows as one sequence."""
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for row in rows:
        ids += row["input_ids"]
        labels += [IGNORED, *row["labels"][1:]]
        positions += range(len(row["input_ids"]))
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def check(model: torch.nn.Module, rows: Sequence[Encoded]) -> None:
    """Check that the model, with its adapter, computes the same for packed rows as for each row alone.

    Args:
        rows: some encoded rows; the beginnings of two of them are tried.

    Raises:
        TrainingError: rows affect each other.
    """
    if not _keeps_apart(model, rows):
        raise TrainingError(
            "with this model and method, rows packed into one sequence affect each other; set packing off"
        )


def goes_by_sequence(model: Any, rows: Sequence[Encoded]) -> bool:
    """Whether the model, with its adapters, can be given concatenated rows, with attention computed per row."""
    has_token_labels = isinstance(rows[0]["labels"], list)
    has_facts = bool(rows[0].keys() - ONE_ROW)
    if not is_fast("attention") or not has_token_labels or has_facts:
        return False
    try:
        with by_sequence(model):
            return _keeps_apart(model, rows) and model._state.are_by_token()
    except Exception:  # a model fails on such a row in its own way; rows are padded then
        return False


def _keeps_apart(model: torch.nn.Module, rows: Sequence[Encoded]) -> bool:
    """Whether the beginnings of two rows have the same logits in one sequence as in separate calls."""
    device = next(model.parameters()).device
    first = torch.tensor(rows[0]["input_ids"][:BEGINNING], device=device)
    second = torch.tensor(rows[-1]["input_ids"][:BEGINNING], device=device)

    def logits(**inputs: torch.Tensor) -> torch.Tensor:
        return model(**inputs, use_cache=False).logits

    with evaluating(model):
        return keeps_apart(logits, first, second)
