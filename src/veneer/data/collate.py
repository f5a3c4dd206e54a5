"""Encoded rows as the tensors of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Sampler

from .encode import IGNORED, Encoded
from .packing import joined


class Collator:
    """Pads rows to the longest of the batch, or lays them end to end: packed ones, and all of them if `flat`.

    Gives input_ids, attention_mask (or position_ids) and labels, (batch, length) each; labels (batch,) for classes.
    """

    def __init__(self, pad: int, flat: bool = False) -> None:
        self.pad, self.flat = pad, flat

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        if self.flat and "position_ids" not in rows[0]:
            rows = [joined(rows)]
        if "position_ids" in rows[0]:
            return {name: torch.tensor([[value for row in rows for value in row[name]]]) for name in rows[0]}
        lengths = [len(row["input_ids"]) for row in rows]
        batch = {"input_ids": _padded([row["input_ids"] for row in rows], self.pad)}
        batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        labels = [row["labels"] for row in rows]
        batch["labels"] = _padded(labels, IGNORED) if isinstance(labels[0], list) else torch.tensor(labels)
        facts = rows[0].keys() - {"input_ids", "labels"}
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in facts}


def _padded(values: Sequence[Sequence[int]], pad: int) -> Tensor:
    longest = max(map(len, values))
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in values])


class Rows(Dataset[Any]):
    """The rows of a run; behind the last one is a row of which nothing is learned."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Encoded:
        return self.rows[i] if i < len(self.rows) else self._blank()

    def _blank(self) -> Encoded:
        first = self.rows[0]
        short = {name: value[:1] if isinstance(value, list) else value for name, value in first.items()}
        return short | {"labels": [IGNORED] if isinstance(first["labels"], list) else IGNORED}


class Shuffled(Sampler[int]):
    """The rows in an order that depends on the seed and the epoch alone, filled up with blanks to a multiple.

    Several processes then share out the very batches that one would make; accelerate would repeat rows instead.
    """

    def __init__(self, count: int, seed: int, multiple: int) -> None:
        self.count, self.seed, self.multiple, self.epoch = count, seed, multiple, 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.count, generator=generator).tolist()
        yield from [self.count] * (len(self) - self.count)

    def __len__(self) -> int:
        return -(-self.count // self.multiple) * self.multiple


def token_sums(logits: Any, labels: Tensor) -> Tensor:
    """(rows, 3): each row's summed loss, learned tokens (or 1 for a class) and how many of them were hit."""
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits
    if labels.dim() == 1:
        logits, labels = logits[:, None], labels[:, None]
    else:
        logits, labels = logits[:, -labels.shape[1] :][:, :-1], labels[:, 1:]
    rows = []
    for row, wanted in zip(logits, labels, strict=True):  # a row at a time: fp32 logits are large
        own = wanted != IGNORED
        row, wanted = row[own].float(), wanted[own]
        hit = (row.argmax(-1) == wanted).sum()
        rows.append(torch.stack([cross_entropy(row, wanted, reduction="sum"), own.sum(), hit]))
    return torch.stack(rows)
