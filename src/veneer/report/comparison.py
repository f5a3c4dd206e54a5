"""Compare two adapters: differences of their configs and tensors, and the angles between their updates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import checkpoint
from ..core.config import Config
from ..files.find import find_weights
from ..maths.low_rank import Pair
from ..targets.walk import by_number
from .inspection import pair_at, place, scaling_at


@dataclass(frozen=True)
class Changed:
    """A tensor with different values in the two files."""

    key: str
    relative: float
    """|first - second| / |first|."""


@dataclass(frozen=True)
class Angle:
    """The angle between two low-rank updates of a module."""

    path: str
    cosine: float
    norms: tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """The difference between two adapters."""

    fields: dict[str, tuple[Any, Any]]
    """Config fields that differ, with their two values."""
    only_first: list[str]
    """Keys of tensors that only the first file has."""
    only_second: list[str]
    """Keys of tensors that only the second file has."""
    other_shape: list[str]
    """Keys of tensors whose shapes differ, with the shapes."""
    changed: list[Changed]
    same: int
    """Number of tensors that are equal bit for bit."""
    angles: list[Angle]

    @property
    def is_none(self) -> bool:
        """Whether the adapters are equal."""
        return not (self.fields or self.only_first or self.only_second or self.other_shape or self.changed)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"is_none": self.is_none}


def diff(first: str | Path, second: str | Path) -> Difference:
    """Compare two adapter directories.

    Raises:
        CheckpointError: an adapter cannot be read, or has values that are not finite.
    """
    first_config = Config.from_pretrained(first)
    second_config = Config.from_pretrained(second)
    first_tensors, _ = checkpoint.read(first)
    second_tensors, _ = checkpoint.read(second)
    other_shape: list[str] = []
    changed: list[Changed] = []
    same = 0
    for key in sorted(first_tensors, key=by_number):
        a = first_tensors[key]
        b = second_tensors.get(key)
        if b is None:
            continue
        if a.shape != b.shape:
            other_shape.append(f"{key}: {list(a.shape)} and {list(b.shape)}")
        elif _equal(a, b):
            same += 1
        else:
            changed.append(Changed(key, _relative(a, b)))
    first_side = _Side(Path(find_weights(first)), first_config, set(first_tensors))
    second_side = _Side(Path(find_weights(second)), second_config, set(second_tensors))
    angles = list(_angles(first_side, second_side))
    return Difference(
        fields=_fields(first_config, second_config),
        only_first=sorted(first_side.keys - second_side.keys, key=by_number),
        only_second=sorted(second_side.keys - first_side.keys, key=by_number),
        other_shape=other_shape,
        changed=changed,
        same=same,
        angles=angles,
    )


def _fields(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, with their values in both configs."""
    first = a.to_dict()
    second = b.to_dict()
    differing = {}
    for name in sorted(first.keys() | second.keys()):
        values = first.get(name), second.get(name)
        if values[0] != values[1]:
            differing[name] = values
    return differing


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _relative(a: Tensor, b: Tensor) -> float:
    a = a.double()
    b = b.double()
    return float((a - b).norm() / a.norm().clamp_min(1e-300))


class _Side(NamedTuple):
    """One of the two adapters."""

    file: Path
    config: Config
    keys: set[str]

    def update(self, path: str) -> Pair | None:
        """A and B of a module, with the scaling included in B; None if it has no low-rank update."""
        keys = {key for key in self.keys if place(key)[0] == path}
        pair = pair_at(self.file, path, keys)
        if pair is None:
            return None
        A, B = pair
        return A, B * scaling_at(self.config, path, pair)


def _angles(first: _Side, second: _Side) -> Iterator[Angle]:
    """Yield the angles of the modules on which both adapters have low-rank updates of the same size."""
    paths: dict[str, None] = {}  # an ordered set
    for key in sorted(first.keys & second.keys, key=by_number):
        path, _ = place(key)
        paths[path] = None
    for path in paths:
        x = first.update(path)
        y = second.update(path)
        if x is None or y is None or _size(x) != _size(y):
            continue
        norms = _norm(x), _norm(y)
        cosine = 0.0
        if all(norms):
            cosine = inner(x, y) / (norms[0] * norms[1])
        yield Angle(path, cosine, norms)


def _size(pair: Pair) -> tuple[int, int]:
    """(out, in) of B A."""
    A, B = pair
    return B.shape[0], A.shape[1]


def _norm(x: Pair) -> float:
    return max(0.0, inner(x, x)) ** 0.5


def inner(x: Pair, y: Pair) -> float:
    """<B A, B' A'> without forming the products: tr(A^T B^T B' A')."""
    A, B = x
    other_A, other_B = y
    return float(((B.T @ other_B) * (A @ other_A.T)).sum())
