"""A LoRA adapter of no project's layout: what every layout is read into and written from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, listing
from ..files import read as files
from ..files.read import tensor_shapes
from ..files.write import write_atomically


@dataclass(frozen=True)
class Pair:
    """The factors of one module: dW = alpha / r * B A."""

    A: Tensor
    """(r, in); of a convolution (r, in, *kernel)."""
    B: Tensor
    """(out, r); of a convolution (out, r, 1, ...)."""
    alpha: float

    @property
    def r(self) -> int:
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def problem(self) -> str | None:
        if self.A.dim() < 2 or self.B.dim() != self.A.dim() or self.B.shape[1] != self.A.shape[0]:
            return f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} are no pair"
        if not (self.A.is_floating_point() and self.B.is_floating_point()):
            return f"numbers of type {self.A.dtype} and {self.B.dtype}"
        finite = bool(torch.isfinite(self.A).all() and torch.isfinite(self.B).all())
        return None if finite else "values that are not finite"


@dataclass
class Lora:
    """Pairs by the paths of the modules in the transformers model."""

    pairs: dict[str, Pair]
    base: str | None = None
    task: str | None = None
    dropout: float = 0.0
    targets: list[str] | str | None = None
    """The `target_modules` that led to these modules, where the layout says it."""

    def check(self, where: Path) -> Lora:
        """Raise CheckpointError unless there are pairs, and all are sound."""
        found = [f"{path}: {problem}" for path, pair in self.pairs.items() if (problem := pair.problem())]
        if found or not self.pairs:
            raise CheckpointError(f"{str(where)!r} is no LoRA adapter:{listing(found or ['it holds no pairs'])}")
        return self

    def matrices_only(self, layout: str) -> None:
        """Raise where the layout has linear layers only."""
        others = [path for path, pair in self.pairs.items() if pair.A.dim() != 2]
        if others:
            raise ConfigError(f"{layout} holds updates of linear layers; these are convolutions:{listing(others)}")

    def one_rank(self, layout: str) -> tuple[int, float]:
        """(rank, alpha) of all modules. Raises where they differ, for layouts that have one of each."""
        kinds = {(pair.r, pair.alpha) for pair in self.pairs.values()}
        if len(kinds) > 1:
            lines = [f"r = {r}, alpha = {alpha:g}" for r, alpha in sorted(kinds)]
            raise ConfigError(f"{layout} has one rank and one alpha for all modules; this adapter has:{listing(lines)}")
        return kinds.pop()


@dataclass
class Hints:
    """What a layout's own files leave open."""

    model: str | None = None
    """The base model, of which the config is read."""
    alpha: float | None = None
    """Of layouts that do not record it."""
    enabled: list[bool] | None = None
    """Which of a fused projection's parts are adapted (loralib's `enable_lora`)."""
    prefix: str | None = None
    """What kohya's keys begin with."""
    allow_pickle: bool = False

    def config(self, base: str | None, why: str) -> Any:
        """The base model's config.

        Raises:
            ConfigError: no base model is known.
        """
        from transformers import AutoConfig

        from ..files.pull import resolve

        name = self.model or base
        if name is None:
            raise ConfigError(f"{why}; name the base model with --model")
        try:
            return AutoConfig.from_pretrained(resolve(name))
        except OSError as error:
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(f"{why}; the config of {name!r} cannot be had ({reason}). Give --model") from None


class Layout(Protocol):
    """One project's way to put a LoRA adapter into a directory."""

    name: str

    def is_here(self, directory: Path) -> bool:
        """Its files are in the directory."""
        ...

    def read(self, directory: Path, hints: Hints) -> Lora: ...

    def write(self, lora: Lora, directory: Path, hints: Hints) -> None:
        """Raises ConfigError where the layout cannot hold the adapter."""
        ...


# Files


def find(directory: Path, *names: str) -> Path | None:
    """The first of some files that is there; patterns are sorted."""
    return next((path for name in names for path in sorted(directory.glob(name)) if path.is_file()), None)


def has_key(file: Path, ending: str) -> bool:
    """A safetensors file has a tensor whose key ends so; one that is not whole has none."""
    try:
        return any(key.endswith(ending) for key in tensor_shapes(file))
    except CheckpointError:
        return False


def read_tensors(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by key, metadata) of a safetensors file, or on request of a pickle of tensors alone.

    Raises:
        CheckpointError: a pickle, or a broken file.
    """
    if path.suffix == ".safetensors":
        tensors, metadata = files.read_tensors(path)
        return files.computable(tensors), metadata
    if not allow_pickle:
        raise CheckpointError(
            f"{str(path)!r} is a pickle, which can run code when it is loaded; if you trust it, pass --allow-pickle "
            "(only tensors are then taken)"
        )
    return files.read_pickle(path), {}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    from safetensors.torch import save

    whole = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    write_atomically(path, save(whole, {"format": "pt", **(metadata or {})}))


def write_settings(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def number(settings: Mapping[str, Any], name: str, path: Path) -> float:
    """A positive number of a config file."""
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise CheckpointError(f"{str(path)!r}: {name} must be a positive number, not {value!r}")
    return value


def paired(tensors: Mapping[str, Tensor], ends: tuple[str, str], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(first, second) by what stands before the endings of their keys.

    Raises:
        CheckpointError: keys of another kind, or halves without the other.
    """
    places = {key: next((end for end in ends if key.endswith(end)), None) for key in tensors}
    strange = [key for key, end in places.items() if end is None]
    bases = dict.fromkeys(key.removesuffix(end) for key, end in places.items() if end is not None)
    alone = [base for base in bases if any(base + end not in tensors for end in ends)]
    if strange or alone:
        what = "these keys are no part of a LoRA" if strange else "the other half is missing of"
        raise CheckpointError(f"{str(path)!r}: {what}:{listing(strange or alone)}")
    return {base: (tensors[base + ends[0]], tensors[base + ends[1]]) for base in bases}
