"""Two adapters side by side: where their configs and tensors differ, and how far their updates point apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import checkpoint
from ..core.config import Config
from ..files.find import find_weights
from ..maths.low_rank import Pair
from .inspection import pair_at, place, scaling_at


@dataclass(frozen=True)
class Changed:
    """A tensor that both files hold, with other values."""

    key: str
    relative: float
    """|first - second| / |first|."""


@dataclass(frozen=True)
class Angle:
    """Two low-rank updates of one module."""

    path: str
    cosine: float
    norms: tuple[float, float]


@dataclass(frozen=True)
class Difference:
    fields: dict[str, tuple[Any, Any]]
    only_first: list[str]
    only_second: list[str]
    other_shape: list[str]
    changed: list[Changed]
    same: int
    """Tensors that are equal, bit for bit."""
    angles: list[Angle]

    @property
    def is_none(self) -> bool:
        return not (self.fields or self.only_first or self.only_second or self.other_shape or self.changed)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"is_none": self.is_none}


def diff(first: str | Path, second: str | Path) -> Difference:
    """Compare two adapter directories.

    Raises:
        CheckpointError: one cannot be read, or holds values that are not finite.
    """
    configs = [Config.from_pretrained(source) for source in (first, second)]
    a, b = (checkpoint.read(source)[0] for source in (first, second))
    common = [key for key in a if key in b]
    alike = [key for key in common if a[key].shape == b[key].shape]
    changed = [Changed(key, _relative(a[key], b[key])) for key in alike if not _equal(a[key], b[key])]
    return Difference(
        fields=dict(_fields(*configs)),
        only_first=sorted(a.keys() - b.keys()),
        only_second=sorted(b.keys() - a.keys()),
        other_shape=[f"{k}: {list(a[k].shape)} and {list(b[k].shape)}" for k in common if k not in alike],
        changed=changed,
        same=len(alike) - len(changed),
        angles=list(_angles([Path(find_weights(s)) for s in (first, second)], configs, set(a), set(b))),
    )


def _fields(a: Config, b: Config) -> Iterator[tuple[str, tuple[Any, Any]]]:
    left, right = a.to_dict(), b.to_dict()
    for name in sorted(left.keys() | right.keys()):
        if left.get(name) != right.get(name):
            yield name, (left.get(name), right.get(name))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / a.norm().clamp_min(1e-300))


def _angles(files: list[Path], configs: list[Config], a: set[str], b: set[str]) -> Iterator[Angle]:
    for path in dict.fromkeys(place(key)[0] for key in sorted(a & b)):
        own = [{key for key in keys if place(key)[0] == path} for keys in (a, b)]
        pairs = [pair for file, keys in zip(files, own, strict=True) if (pair := pair_at(file, path, keys)) is not None]
        if len(pairs) < 2 or any(
            x.shape[d] != y.shape[d] for d, (x, y) in zip((1, 0), zip(*pairs, strict=True), strict=True)
        ):
            continue
        scaled = [(A, B * scaling_at(config, path, (A, B))) for config, (A, B) in zip(configs, pairs, strict=True)]
        norms = [max(0.0, inner(pair, pair)) ** 0.5 for pair in scaled]
        cosine = inner(*scaled) / (norms[0] * norms[1]) if all(norms) else 0.0
        yield Angle(path, cosine, (norms[0], norms[1]))


def inner(x: Pair, y: Pair) -> float:
    """<B A, B' A'> without forming the products: tr(A^T B^T B' A')."""
    return float(((x[1].T @ y[1]) * (x[0] @ y[0].T)).sum())
