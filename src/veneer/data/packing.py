"""Several rows in one sequence: less padding. Position ids start again at each row, which keeps them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import TrainingError
from ..ops import is_fast
from ..ops.attention import by_sequence
from .encode import IGNORED, Encoded

ONE_ROW = {"input_ids", "labels", "position_ids"}
"""What a row may hold to be laid behind another; anything else belongs to a row as a whole."""
OPEN = 64
"""Sequences that are still being filled."""


def pack(rows: Sequence[Encoded], length: int) -> list[Encoded]:
    """Rows put together in sequences of at most `length` tokens, each into the fullest that has room for it.

    The first token of a row is no longer learned: nothing in its own row predicts it.
    """
    done: list[list[Encoded]] = []
    filling: list[tuple[int, list[Encoded]]] = []
    for row in rows:
        size = len(row["input_ids"])
        fitting = [i for i, (used, _) in enumerate(filling) if used + size <= length]
        if fitting:
            best = max(fitting, key=lambda i: filling[i][0])
            filling[best] = (filling[best][0] + size, [*filling[best][1], row])
        else:
            filling.append((size, [row]))
        if len(filling) > OPEN:
            fullest = max(range(len(filling)), key=lambda i: filling[i][0])
            done.append(filling.pop(fullest)[1])
    return [joined(members) for members in [*done, *(members for _, members in filling)]]


def joined(members: Sequence[Encoded]) -> Encoded:
    """One sequence of several rows."""
    labels: list[int] = []
    for row in members:
        labels += [IGNORED, *row["labels"][1:]]
    return {
        "input_ids": [token for row in members for token in row["input_ids"]],
        "labels": labels,
        "position_ids": [place for row in members for place in range(len(row["input_ids"]))],
    }


def check(model: torch.nn.Module, rows: Sequence[Encoded]) -> None:
    """Raise unless the model, adapter on, computes of packed rows what it computes of each alone.

    Args:
        rows: some encoded rows; the beginnings of two of them are tried.

    Raises:
        TrainingError: it lets rows see each other.
    """
    if not keeps_apart(model, rows):
        raise TrainingError("with this model and method, rows packed into one sequence see each other; set packing off")


def goes_by_sequence(model: Any, rows: Sequence[Encoded]) -> bool:
    """Whether the model, adapters on, can be given any rows end to end, with attention computed by sequence."""
    if not is_fast("attention") or not isinstance(rows[0]["labels"], list) or rows[0].keys() - ONE_ROW:
        return False
    try:
        with by_sequence(model):
            return keeps_apart(model, rows) and model._state.are_by_token()
    except (NotImplementedError, RuntimeError, TypeError, ValueError):  # a model that does not take such a row
        return False


@torch.no_grad()
def keeps_apart(model: torch.nn.Module, rows: Sequence[Encoded]) -> bool:
    """Whether the beginnings of two rows give the same logits in one sequence and each alone."""
    pair = [{name: row[name][:16] for name in ("input_ids", "labels")} for row in (rows[0], rows[-1])]
    training, device = model.training, next(model.parameters()).device
    model.eval()
    both = joined(pair)
    ids, places = (torch.tensor([both[name]], device=device) for name in ("input_ids", "position_ids"))
    second = torch.tensor([pair[1]["input_ids"]], device=device)
    packed = model(input_ids=ids, position_ids=places, use_cache=False).logits[:, -second.shape[1] :]
    alone = model(input_ids=second, use_cache=False).logits[:, -second.shape[1] :]
    model.train(training)
    return torch.allclose(packed, alone, rtol=1e-2, atol=1e-2 * float(alone.abs().max()))
