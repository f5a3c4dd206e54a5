"""Bottlenecks beside a module that is no module of its own: they read the input where the MLP begins."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ...core.adapter import Adapter
from ...errors import VeneerError
from ...targets.target import Target
from ...targets.walk import matches
from .bottleneck import Bottleneck

if TYPE_CHECKING:
    from ..bottleneck import BottleneckConfig


class Inputs(nn.Module):
    """What the MLPs under way were given, by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, Tensor] = {}


def layer_of(path: str) -> str:
    return re.sub(r"(.*\.\d+)\..*", r"\1", path)


class Tap(Adapter):
    """Stands where an MLP begins, and notes its input."""

    kinds = frozenset({"linear"})

    def pre(self, x: Tensor) -> Tensor:
        self.shared.held[layer_of(self.target.path)] = x
        return x


class Parallel(Bottleneck):
    """Beside a block or a linear layer."""

    def reads(self, target: Target) -> int:
        return target.in_features

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.update(x)


class Tapped(Bottleneck):
    """Stands where an MLP ends, and reads what it was given."""

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.shared.held.pop(layer_of(self.target.path), None)
        if x is None:
            raise VeneerError(f"no input of its MLP came before {self.target.path!r}; target_modules must pair them")
        return y + self.update(x.to(y.dtype))


def part_at(config: BottleneckConfig, target: Target, shared: nn.Module | None) -> Adapter:
    """The adapter for one of the places: beside a module, or at the beginning or the end of an MLP that is none."""
    if not config.input_modules:
        return Parallel(config, target)
    begins = any(matches(target.path, entry) for entry in config.input_modules)
    return (Tap if begins else Tapped)(config, target, shared)
