"""A LoRA adapter independent of file layouts: every layout is read into it and written from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, first_line, listing
from ..files import read as files
from ..files.read import tensor_shapes
from ..files.write import write_atomically


@dataclass(frozen=True)
class Pair:
    """The factors of one module: dW = alpha / r * B A."""

    A: Tensor
    """(r, in); for a convolution (r, in, *kernel)."""
    B: Tensor
    """(out, r); for a convolution (out, r, 1, ...)."""
    alpha: float

    @property
    def r(self) -> int:
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def problem(self) -> str | None:
        """What is wrong with the factors, or None."""
        if self.A.dim() < 2 or self.B.dim() != self.A.dim() or self.B.shape[1] != self.A.shape[0]:
            return f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} do not fit together"
        if not (self.A.is_floating_point() and self.B.is_floating_point()):
            return f"A and B must be floating point, not {self.A.dtype} and {self.B.dtype}"
        is_finite = torch.isfinite(self.A).all() and torch.isfinite(self.B).all()
        if not is_finite:
            return "values that are not finite"
        return None


@dataclass
class Lora:
    """A LoRA adapter: factors by the paths of the modules in the transformers model."""

    pairs: dict[str, Pair]
    base: str | None = None
    task: str | None = None
    dropout: float = 0.0
    targets: list[str] | str | None = None
    """The `target_modules` that selected these modules, if the layout records it."""

    def check(self, where: Path) -> Lora:
        """Return self; raise CheckpointError if there are no pairs, or some are invalid."""
        problems = []
        for path, pair in self.pairs.items():
            problem = pair.problem()
            if problem is not None:
                problems.append(f"{path}: {problem}")
        if not self.pairs:
            problems.append("it holds no pairs of A and B")
        if problems:
            raise CheckpointError(f"{str(where)!r} is not a valid LoRA adapter:{listing(problems)}")
        return self

    def matrices_only(self, layout: str) -> None:
        """Raise ConfigError if there are convolutions, for layouts that have linear layers only."""
        convolutions = [path for path, pair in self.pairs.items() if pair.A.dim() != 2]
        if convolutions:
            raise ConfigError(
                f"{layout} can store updates of linear layers only; these are convolutions:{listing(convolutions)}"
            )

    def one_rank(self, layout: str) -> tuple[int, float]:
        """(rank, alpha) of all modules; raises ConfigError if they differ, for layouts that have one of each."""
        values = {(pair.r, pair.alpha) for pair in self.pairs.values()}
        if len(values) > 1:
            lines = [f"r = {r}, alpha = {alpha:g}" for r, alpha in sorted(values)]
            raise ConfigError(
                f"{layout} can store only one rank and one alpha for all modules; this adapter has:{listing(lines)}"
            )
        return values.pop()

    def tensors(self, end_A: str, end_B: str, prefix: str = "") -> dict[str, Tensor]:
        """The factors by key: prefix, path of the module, and an ending for A or B."""
        tensors = {}
        for path, pair in self.pairs.items():
            tensors[f"{prefix}{path}{end_A}"] = pair.A
            tensors[f"{prefix}{path}{end_B}"] = pair.B
        return tensors


@dataclass
class Hints:
    """Facts that a layout's files do not record."""

    model: str | None = None
    """The base model, whose config is read."""
    alpha: float | None = None
    """`lora_alpha`, for layouts that do not record it."""
    enabled: list[bool] | None = None
    """Which parts of a fused projection are adapted (loralib's `enable_lora`)."""
    prefix: str | None = None
    """The start of kohya's keys."""
    allow_pickle: bool = False

    def config(self, base: str | None, why: str) -> Any:
        """The base model's config.

        Raises:
            ConfigError: the base model is unknown, or its config cannot be read.
        """
        from transformers import AutoConfig

        from ..files.locate import locate

        name = self.model or base
        if name is None:
            raise ConfigError(f"{why}; name the base model with --model")
        try:
            place = locate(name)
            return AutoConfig.from_pretrained(place.name, **place.arguments)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{why}, but the config of {name!r} cannot be read ({first_line(error)}); give the base model with "
                "--model"
            ) from None


class Layout(Protocol):
    """How one project stores a LoRA adapter in a directory."""

    name: str

    def is_here(self, directory: Path) -> bool:
        """Whether the directory has files of this layout."""
        ...

    def read(self, directory: Path, hints: Hints) -> Lora: ...

    def write(self, lora: Lora, directory: Path, hints: Hints) -> None:
        """Raises ConfigError if the layout cannot store the adapter."""
        ...


# Files


def find(directory: Path, *names: str) -> Path | None:
    """The first file that matches one of the names or glob patterns, in their order, then alphabetically."""
    for name in names:
        for path in sorted(directory.glob(name)):
            if path.is_file():
                return path
    return None


def has_key(file: Path, ending: str) -> bool:
    """Whether a safetensors file has a key with this ending; False for a damaged file."""
    try:
        return any(key.endswith(ending) for key in tensor_shapes(file))
    except CheckpointError:
        return False


def read_tensors(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by key, metadata) of a safetensors file or, if allowed, of a pickle that holds only tensors.

    Raises:
        CheckpointError: the file is a pickle and that is not allowed, or it is damaged.
    """
    if path.suffix == ".safetensors":
        tensors, metadata = files.read_tensors(path)
        return files.computable(tensors), metadata
    if not allow_pickle:
        raise CheckpointError(
            f"{str(path)!r} is a pickle, which can run code when it is loaded; if you trust it, pass --allow-pickle "
            "(only tensors are loaded)"
        )
    return files.read_pickle(path), {}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    from safetensors.torch import save

    whole = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    write_atomically(path, save(whole, {"format": "pt", **(metadata or {})}))


def write_settings(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def number(settings: Mapping[str, Any], name: str, path: Path) -> float:
    """A setting from a config file that must be a positive number."""
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise CheckpointError(f"{str(path)!r}: {name} must be a positive number, not {value!r}")
    return value


def paired(tensors: Mapping[str, Tensor], ends: tuple[str, str], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(first, second) by the part of their keys before the endings.

    Raises:
        CheckpointError: a key has neither ending, one tensor of a pair is missing, or one is not at least a matrix.
    """
    bases: dict[str, None] = {}
    unknown = []
    for key in tensors:
        base = _without_end(key, ends)
        if base is None:
            unknown.append(key)
        else:
            bases[base] = None
    if unknown:
        raise CheckpointError(f"{str(path)!r}: these keys do not belong to a LoRA:{listing(unknown)}")
    first, second = ends
    pairs = {}
    incomplete = []
    for base in bases:
        if base + first in tensors and base + second in tensors:
            pairs[base] = (tensors[base + first], tensors[base + second])
        else:
            incomplete.append(base)
    if incomplete:
        raise CheckpointError(f"{str(path)!r}: A or B is missing for:{listing(incomplete)}")
    for base, factors in pairs.items():
        for factor in factors:
            if factor.dim() < 2 or factor.numel() == 0:
                raise CheckpointError(
                    f"{str(path)!r}: {base!r} has a factor of shape {tuple(factor.shape)}, which is not a matrix"
                )
    return pairs


def _without_end(key: str, ends: tuple[str, str]) -> str | None:
    for end in ends:
        if key.endswith(end):
            return key.removesuffix(end)
    return None
