"""Bottlenecks in parallel to an MLP, including an MLP that is not a module.

Such an MLP consists only of a first and a last linear layer. An adapter on the first layer stores its input, which the
bottleneck on the last layer reads.
"""

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
    """The inputs of the MLPs that are being computed, by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, Tensor] = {}


def layer_of(path: str) -> str:
    """The path of the layer that a module belongs to, up to its index."""
    return re.sub(r"(.*\.\d+)\..*", r"\1", path)


class Tap(Adapter):
    """Stores the input of an MLP's first linear layer."""

    kinds = frozenset({"linear"})

    def pre(self, x: Tensor) -> Tensor:
        self.shared.held[layer_of(self.target.path)] = x
        return x


class Parallel(Bottleneck):
    """A bottleneck in parallel to a block or a linear layer: it reads the same input."""

    def reads(self, target: Target) -> int:
        return target.in_features

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.update(x)


class Tapped(Bottleneck):
    """A bottleneck on an MLP's last linear layer that reads the MLP's stored input."""

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        mlp_input = self.shared.held.pop(layer_of(self.target.path), None)
        if mlp_input is None:
            raise VeneerError(
                f"{self.target.path!r} got no input from its MLP's first layer; target_modules must name both layers"
            )
        return y + self.update(mlp_input.to(y.dtype))


def part_at(config: BottleneckConfig, target: Target, shared: nn.Module | None) -> Adapter:
    """The adapter for one target of a parallel bottleneck: a whole module, or the first or last layer of an MLP."""
    if not config.input_modules:
        return Parallel(config, target)
    if any(matches(target.path, entry) for entry in config.input_modules):
        return Tap(config, target, shared)
    return Tapped(config, target, shared)
