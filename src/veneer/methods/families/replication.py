"""A model of more layers than it has: ranges of its layers one after another, the repeated ones sharing weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...core.state import state_of
from ...errors import ConfigError, TargetError
from ...targets.roles import layer_list


class Replication:
    """What a replication changed, to take it back."""

    def __init__(self, holder: nn.Module, name: str, old: nn.ModuleList, config: Any, settings: dict[str, Any]) -> None:
        self.holder, self.name, self.old, self.config, self.settings = holder, name, old, config, settings

    def undo(self) -> None:
        self.holder._modules[self.name] = self.old
        self.config.__dict__.update(self.settings)


def replicate(model: nn.Module, ranges: Sequence[Sequence[int]]) -> Replication:
    """Rebuild the list of layers from ranges [start, end) of it, in place.

    Raises:
        ConfigError: a range lies outside the layers, or is none.
        TargetError: the model shows no list of layers, or has adapters already.
    """
    if state_of(model) is not None:
        raise TargetError(
            "layer_replication changes the model's layers, on which there are adapters; unload them first"
        )
    path = layer_list(model)
    above, _, name = path.rpartition(".")
    holder, old = model.get_submodule(above), model.get_submodule(path)
    wrong = [r for r in ranges if len(r) != 2 or not 0 <= r[0] < r[1] <= len(old)]  # type: ignore[arg-type]
    if wrong:
        raise ConfigError(f"layer_replication: {wrong[0]} is no range of the {len(old)} layers")  # type: ignore[arg-type]
    order = [i for start, end in ranges for i in range(start, end)]
    holder._modules[name] = nn.ModuleList(_sharing(old[i], place) for place, i in enumerate(order))  # type: ignore[index]
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    before = {
        key: config.__dict__[key] for key in ("num_hidden_layers", "n_layer", "layer_types") if key in config.__dict__
    }
    _resize(config, order)
    return Replication(holder, name, old, config, before)  # type: ignore[arg-type]


def _resize(config: Any, order: list[int]) -> None:
    for key in ("num_hidden_layers", "n_layer"):
        if key in config.__dict__:
            config.__dict__[key] = len(order)
    kinds = config.__dict__.get("layer_types")
    if kinds is not None:
        config.__dict__["layer_types"] = [kinds[i] for i in order]


def _sharing(layer: nn.Module, place: int) -> nn.Module:
    """A copy of a layer that shares its tensors and knows its own place (in the cache)."""
    tensors = {id(t): t for t in (*layer.parameters(), *layer.buffers())}
    twin = copy.deepcopy(layer, memo=tensors)  # type: ignore[arg-type]
    for module in twin.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = place  # type: ignore[assignment]
    return twin
