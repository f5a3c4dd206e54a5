"""A model on the meta device whose weights lie in files: bound to it while they are needed, then let go.

Names in files are not always names in the model: transformers renames them, and fuses or splits some (the experts of a
mixture are one parameter there and many tensors in the files).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotMergeable, listing
from ..upstream import weights
from .shards import Shards


@dataclass
class Group:
    """Tensors of the files that are other tensors in the model."""

    transform: Any
    keys: list[tuple[str, str]] = field(default_factory=list)
    """(key in the files, the pattern of the transform that it matched)."""
    names: list[str] = field(default_factory=list)
    """The parameters they become."""


@dataclass
class Tie:
    """One Parameter, and every place that has it."""

    parameter: nn.Parameter
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def hold(self, parameter: nn.Parameter) -> None:
        for module, leaf in self.places:
            module._parameters[leaf] = parameter


class MappedModel:
    """A transformers model on the meta device and the files of its weights.

    Attributes:
        homes: keys in the files by the names of the parameters and buffers they are, unchanged.
        groups: where files and model differ in more than names, by the parameters' names.
        ties: the Parameters by each of their names.
        strays: keys that are nothing in the model.
    """

    def __init__(self, model: Any, shards: Shards) -> None:
        self.model, self.shards = model, shards
        self.ties = ties_of(model)
        self.homes: dict[str, str] = {}
        self.groups: dict[str, Group] = {}
        self.strays: list[str] = []
        self._place()

    def _place(self) -> None:
        conversions = weights.conversions(self.model)
        by_pattern = {pattern: t for t in conversions.converters for pattern in t.source_patterns}
        there = self.model.state_dict()
        groups: dict[str, Group] = {}
        for key in sorted(self.shards.entries, key=weights.order_of):
            name, pattern = conversions.rename(key, self.model.base_model_prefix, there)
            if name not in there and key in there:
                name, pattern = key, None
            if name not in there:
                self.strays.append(key)
            elif pattern is None:
                self.homes[name] = key
            else:
                group = groups.setdefault(name, Group(copy.deepcopy(by_pattern[pattern])))
                group.keys.append((key, pattern))
        weights.remember(self.model, conversions.used())
        for first, group in groups.items():
            group.names = self._names(first, group)
            self.groups |= dict.fromkeys(group.names, group)

    def _names(self, first: str, group: Group) -> list[str]:
        """All parameters that a group becomes: a transform names the first alone."""
        targets = group.transform.target_patterns
        names = [first.replace(targets[0], target) for target in targets] if len(targets) > 1 else [first]
        lost = [name for name in names if name not in self.ties]
        if lost:
            raise NotMergeable(f"the files' {group.keys[0][0]!r} becomes parameters the model lacks:{listing(lost)}")
        return names

    # Values

    def bind_all(self) -> None:
        """Bind every parameter that is in the files as it is. Those that transformers converts stay on meta."""
        names = {key: name for name, key in self.homes.items() if name in self.ties}
        for key, tensor in self.shards.tensors([key for key, name in names.items() if self.fits(name)]):
            self._hold(self.ties[names[key]], tensor)

    def bind_new(self) -> None:
        """Bind what is still on meta, is not converted, and so must come from the adapters, to memory of its size."""
        for name, tie in self.ties.items():
            module, leaf = tie.places[0]
            bound = module._parameters[leaf]
            if bound is not None and bound.is_meta and name not in self.groups:
                self._hold(tie, torch.empty(tie.parameter.shape))

    def bind(self, names: Iterable[str]) -> None:
        """Bind some parameters, on mappings of their own."""
        for name in names:
            home = self.home(name)
            if name in self.groups:
                self._bind_group(self.groups[name])
            elif home is not None and self.fits(name):
                self._hold(self.ties[name], self.shards.tensor(home))

    def _bind_group(self, group: Group) -> None:
        transform = copy.deepcopy(group.transform)
        for key, tensor in self.shards.tensors([key for key, _ in group.keys]):
            transform.add_tensor(group.names[0], key, dict(group.keys)[key], tensor)
        made = transform.convert(group.names[0], model=self.model, config=self.model.config)
        for name, tensor in made.items():
            self._hold(self.ties[name], tensor[0] if isinstance(tensor, list) else tensor)

    def _hold(self, tie: Tie, tensor: Tensor) -> None:
        # not a Parameter of the tensor itself: of integers it would refuse
        tie.hold(nn.Parameter(tensor, requires_grad=False))

    def value(self, name: str) -> Tensor:
        """What is bound to a parameter now."""
        module, leaf = self.ties[name].places[0]
        held = module._parameters[leaf]
        assert held is not None
        return held.detach()

    def home(self, name: str) -> str | None:
        """The key of a parameter, or of one that it is tied to."""
        names = (name, *self.ties[name].names) if name in self.ties else (name,)
        return next((self.homes[n] for n in names if n in self.homes), None)

    def fits(self, name: str) -> bool:
        """The files have a parameter in the model's shape."""
        home = self.home(name)
        return home is not None and self.shards.entries[home].shape == tuple(self.ties[name].parameter.shape)

    def release(self, names: Iterable[str] | None = None) -> None:
        """Let go of the values of some parameters, or of all."""
        for name in self.ties if names is None else names:
            self.ties[name].hold(self.ties[name].parameter)

    def reverted(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the files that a group's parameters came from.

        Raises:
            NotMergeable: transformers would not write them as they were.
        """
        found = weights.revert(self.model, tensors)
        keys = {key for key, _ in group.keys}
        if set(found) != keys or any(tuple(t.shape) != self.shards.entries[k].shape for k, t in found.items()):
            raise NotMergeable(
                f"{group.names[0]!r} cannot be written back as its files have it; merge in memory with "
                f"merge_and_unload(), then save_pretrained(). Expected:{listing(sorted(keys))}"
            )
        return found

    def without_home(self) -> list[str]:
        """Parameters for which the files have nothing."""
        return [name for name in self.ties if self.home(name) is None and name not in self.groups]


def ties_of(model: nn.Module) -> dict[str, Tie]:
    ties: dict[int, Tie] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                tie = ties.setdefault(id(parameter), Tie(parameter))
                tie.names.append(f"{path}.{leaf}" if path else leaf)
                tie.places.append((module, leaf))
    return {name: tie for tie in ties.values() for name in tie.names}


def widened(parameter: Tensor) -> nn.Parameter:
    """In at least fp32."""
    if not parameter.is_floating_point():
        return nn.Parameter(parameter, requires_grad=False)
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return nn.Parameter(parameter.to(wide), requires_grad=False)
