"""Layer replication: build a deeper model from ranges of a model's layers; repeated layers share their weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...core.state import state_of
from ...errors import ConfigError, TargetError
from ...targets.roles import layer_list

LENGTH_FIELDS = ("num_hidden_layers", "n_layer")
"""The names that model configs use for the number of layers."""


@dataclass(eq=False)
class Replication:
    """What a replication changed in a model, and how to undo it."""

    holder: nn.Module
    """The module that holds the list of layers."""
    name: str
    """The name of the list in `holder`."""
    old: nn.ModuleList
    """The original list."""
    config: Any
    """The model's config."""
    settings: dict[str, Any]
    """The original values of the changed fields of `config`."""

    def undo(self) -> None:
        self.holder._modules[self.name] = self.old
        self.config.__dict__.update(self.settings)


def replicate(model: nn.Module, ranges: Sequence[Sequence[int]]) -> Replication:
    """Replace the model's list of layers, in place, by ranges [start, end) of it.

    Raises:
        ConfigError: a range is malformed or exceeds the number of layers.
        TargetError: no list of layers is found in the model, or the model already has adapters.
    """
    if state_of(model) is not None:
        raise TargetError(
            "layer_replication changes the model's layers, which already have adapters; unload them first"
        )
    path = layer_list(model)
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    old: Any = model.get_submodule(path)
    order = _order(ranges, len(old))
    layers = [_sharing(old[i], place) for place, i in enumerate(order)]
    holder._modules[name] = nn.ModuleList(layers)
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    settings = _resize(config, order)
    return Replication(holder, name, old, config, settings)


def _order(ranges: Sequence[Sequence[int]], length: int) -> list[int]:
    """The indices of the layers in their new order."""
    order: list[int] = []
    for bounds in ranges:
        if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= length:
            raise ConfigError(f"layer_replication: {bounds} is no range of the {length} layers")
        order += range(bounds[0], bounds[1])
    return order


def _resize(config: Any, order: list[int]) -> dict[str, Any]:
    """Adjust the model's config to its new layers; return the former values of the changed fields."""
    values = config.__dict__
    former = {}
    for key in LENGTH_FIELDS:
        if key in values:
            former[key] = values[key]
            values[key] = len(order)
    if "layer_types" in values:
        layer_types = values["layer_types"]
        former["layer_types"] = layer_types
        if layer_types is not None:
            values["layer_types"] = [layer_types[i] for i in order]
    return former


def _sharing(layer: nn.Module, place: int) -> nn.Module:
    """A copy of a layer that shares its tensors but has its own index, which selects its part of the cache."""
    tensors: dict[int, Any] = {id(t): t for t in (*layer.parameters(), *layer.buffers())}
    twin = copy.deepcopy(layer, memo=tensors)
    for module in twin.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = place  # type: ignore[assignment]
    return twin
