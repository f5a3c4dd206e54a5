"""Batches of encoded rows as tensors, the order of rows in an epoch, and sums of the loss per row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Sampler

from .encode import IGNORED, Encoded
from .packing import joined

MOST_LOGITS = 2**27
"""Bytes of logits, in fp32, that are computed at a time in evaluation. Training does not hold the logits of all tokens,
so with those of a whole batch evaluation would need more memory than training."""


class Collator:
    """Pads rows to the longest row of the batch. Packed rows, and all rows if `flat`, are concatenated instead.

    The batch has input_ids, attention_mask (or position_ids) and labels, each (batch, length). Labels that are classes
    are (batch,).
    """

    def __init__(self, pad: int, flat: bool = False) -> None:
        self.pad = pad
        self.flat = flat

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        if self.flat and "position_ids" not in rows[0]:
            rows = [joined(rows)]
        if "position_ids" in rows[0]:
            return _concatenated(rows)
        return self._padded_batch(rows)

    def _padded_batch(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows]
        labels = [row["labels"] for row in rows]
        lengths = torch.tensor(list(map(len, ids)))
        positions = torch.arange(int(lengths.max()))
        batch = {"input_ids": _padded(ids, self.pad)}
        batch["attention_mask"] = (positions < lengths[:, None]).long()  # (batch, length)
        batch["labels"] = _padded(labels, IGNORED) if isinstance(labels[0], list) else torch.tensor(labels)
        for name in rows[0].keys() - {"input_ids", "labels"}:
            batch[name] = torch.tensor([row[name] for row in rows])
        return batch


def _concatenated(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """Rows end to end: a batch of one sequence."""
    batch = {}
    for name in rows[0]:
        values = chain.from_iterable(row[name] for row in rows)
        batch[name] = torch.tensor([list(values)])
    return batch


def _padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Rows padded at the end to the longest: (rows, length)."""
    longest = max(map(len, rows))
    padded = []
    for row in rows:
        padding = [pad] * (longest - len(row))
        padded.append([*row, *padding])
    return torch.tensor(padded)


class Rows(Dataset[Any]):
    """The rows of a run. An index past the last row gives a blank row, which has no learned tokens."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Encoded:
        if i < len(self.rows):
            return self.rows[i]
        return _blank(self.rows[0])


def _blank(row: Encoded) -> Encoded:
    """A row, or a pair of rows, cut to one token, with its labels masked."""
    blank: Encoded = {}
    for name, value in row.items():
        if isinstance(value, dict):
            blank[name] = _blank(value)
        else:
            blank[name] = value[:1] if isinstance(value, list) else value
    if "labels" in blank:
        blank["labels"] = [IGNORED] if isinstance(blank["labels"], list) else IGNORED
    return blank


class Shuffled(Sampler[int]):
    """A row order that depends only on the seed and the epoch, padded with blank rows to a multiple of `multiple`.

    So several processes share the batches that one process would use. accelerate would repeat rows instead.
    """

    def __init__(self, count: int, seed: int, multiple: int) -> None:
        self.count = count
        self.seed = seed
        self.multiple = multiple
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.count, generator=generator).tolist()
        yield from [self.count] * (len(self) - self.count)

    def __len__(self) -> int:
        return -(-self.count // self.multiple) * self.multiple


def token_sums(logits: Any, labels: Tensor) -> Tensor:
    """Per row, (rows, 3): the summed loss, the number of learned tokens (1 for a class), and how many were right."""
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    if labels.dim() == 1:
        logits = logits[:, None]
        labels = labels[:, None]
    else:
        logits = logits[:, -labels.shape[1] :][:, :-1]
        labels = labels[:, 1:]
    sums = []
    for row_logits, row_labels in zip(logits, labels, strict=True):  # one row at a time: fp32 logits are large
        learned = row_labels != IGNORED
        scores = row_logits[learned].float()  # (learned, vocabulary)
        wanted = row_labels[learned]
        hits = (scores.argmax(-1) == wanted).sum()
        loss = cross_entropy(scores, wanted, reduction="sum")
        sums.append(torch.stack([loss, learned.sum(), hits]))
    return torch.stack(sums)
