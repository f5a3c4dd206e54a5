"""A model on the meta device whose weights are bound to tensors in files while they are needed.

Names in files are not always names in the model: transformers renames tensors, and fuses or splits some of them (the
experts of a mixture are one parameter in the model and many tensors in the files).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotMergeable, listing
from ..targets.walk import by_number
from ..upstream import weights
from .shards import Shards


@dataclass
class Group:
    """Tensors in the files that transformers converts together into parameters of the model."""

    transform: Any
    keys: list[tuple[str, str]] = field(default_factory=list)
    """(key in the files, the pattern of the transform that it matched)."""
    names: list[str] = field(default_factory=list)
    """The parameters that result from the conversion."""


@dataclass
class Tie:
    """A Parameter with all its names (several for tied weights) and the modules that hold it."""

    parameter: nn.Parameter
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def hold(self, parameter: nn.Parameter) -> None:
        """Bind another Parameter in all places."""
        for module, leaf in self.places:
            module._parameters[leaf] = parameter


class MappedModel:
    """A transformers model on the meta device, and the files of its weights.

    Attributes:
        homes: for each parameter or buffer that the files store unchanged, its key in the files.
        groups: for each parameter that results from a conversion, its group.
        ties: the Parameters, by each of their names.
        strays: keys in the files for which the model has no tensor.
        brought: values of parameters that an adapter was trained with, and that replace those in the files.
    """

    def __init__(self, model: Any, shards: Shards) -> None:
        self.model = model
        self.shards = shards
        self.ties = ties_of(model)
        self.homes: dict[str, str] = {}
        self.groups: dict[str, Group] = {}
        self.strays: list[str] = []
        self.brought: dict[str, Tensor] = {}
        self._assign_keys()

    def _assign_keys(self) -> None:
        """Assign each key in the files to `homes`, `groups` or `strays`."""
        conversions = weights.conversions(self.model)
        by_pattern: dict[str, Any] = {}
        for transform in conversions.converters:
            by_pattern |= dict.fromkeys(transform.source_patterns, transform)
        tensors = self.model.state_dict()
        groups: dict[str, Group] = {}
        for key in sorted(self.shards.entries, key=weights.order_of):
            name, pattern = conversions.rename(key, self.model.base_model_prefix, tensors)
            if name not in tensors and key in tensors:
                name = key
                pattern = None
            if name not in tensors:
                self.strays.append(key)
            elif pattern is None:
                self.homes[name] = key
            else:
                if name not in groups:
                    groups[name] = Group(copy.deepcopy(by_pattern[pattern]))
                groups[name].keys.append((key, pattern))
        weights.remember(self.model, conversions.used())
        for first, group in groups.items():
            group.names = self._names(first, group)
            self.groups |= dict.fromkeys(group.names, group)

    def _names(self, first: str, group: Group) -> list[str]:
        """All parameters that a group is converted to; renaming gives only the first."""
        names = [first]
        targets = group.transform.target_patterns
        if len(targets) > 1:
            names = [first.replace(targets[0], target) for target in targets]
        missing = [name for name in names if name not in self.ties]
        if missing:
            key, _ = group.keys[0]
            raise NotMergeable(
                f"{key!r} in the base's files is converted to parameters that the model lacks:{listing(missing)}"
            )
        return names

    # Values

    def bind_all(self) -> None:
        """Bind every parameter that the files store unchanged. Converted parameters stay on the meta device."""
        names = {}
        for name, key in self.homes.items():
            if name in self.ties and self.fits(name):
                names[key] = name
        for key, tensor in self.shards.tensors(list(names)):
            self._bind_tensor(self.ties[names[key]], tensor)

    def bind_new(self) -> None:
        """Allocate memory for parameters that the files do not store, and whose values come from the adapters."""
        for name, tie in self.ties.items():
            module, leaf = tie.places[0]
            bound = module._parameters[leaf]
            if bound is not None and bound.is_meta and name not in self.groups:
                self._bind_tensor(tie, torch.empty(tie.parameter.shape))

    def bind(self, names: Iterable[str]) -> None:
        """Bind some parameters; each gets a separate mapping of its file."""
        for name in names:
            home = self.home(name)
            brought = [self.brought[tied] for tied in self.ties[name].names if tied in self.brought]
            if brought:
                self._bind_tensor(self.ties[name], brought[0])
            elif name in self.groups:
                self._bind_group(self.groups[name])
            elif home is not None and self.fits(name):
                self._bind_tensor(self.ties[name], self.shards.tensor(home))

    def _bind_group(self, group: Group) -> None:
        transform = copy.deepcopy(group.transform)
        first = group.names[0]
        patterns = dict(group.keys)
        for key, tensor in self.shards.tensors([key for key, _ in group.keys]):
            transform.add_tensor(first, key, patterns[key], tensor)
        converted = transform.convert(first, model=self.model, config=self.model.config)
        for name, tensor in converted.items():
            if isinstance(tensor, list):
                tensor = tensor[0]
            self._bind_tensor(self.ties[name], tensor)

    def _bind_tensor(self, tie: Tie, tensor: Tensor) -> None:
        tie.hold(nn.Parameter(tensor, requires_grad=False))  # integer tensors cannot require gradients

    def value(self, name: str) -> Tensor:
        """The tensor that is currently bound to a parameter."""
        module, leaf = self.ties[name].places[0]
        bound = module._parameters[leaf]
        assert bound is not None
        return bound.detach()

    def home(self, name: str) -> str | None:
        """The key in the files of a parameter, or of one that it is tied to."""
        names = [name]
        if name in self.ties:
            names += self.ties[name].names
        for candidate in names:
            if candidate in self.homes:
                return self.homes[candidate]
        return None

    def fits(self, name: str) -> bool:
        """Whether the files store a parameter in the model's shape."""
        home = self.home(name)
        if home is None:
            return False
        return self.shards.entries[home].shape == tuple(self.ties[name].parameter.shape)

    def release(self, names: Iterable[str] | None = None) -> None:
        """Release the values of some parameters, or of all: they become placeholders on the meta device."""
        if names is None:
            names = self.ties
        for name in names:
            tie = self.ties[name]
            tie.hold(tie.parameter)

    def reverted(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a group's parameters as the files store them, by key.

        Raises:
            NotMergeable: transformers would store them under other keys or in other shapes.
        """
        stored = weights.revert(self.model, tensors)
        keys = {key for key, _ in group.keys}
        is_same = stored.keys() == keys
        is_same = is_same and all(tuple(t.shape) == self.shards.entries[key].shape for key, t in stored.items())
        if not is_same:
            raise NotMergeable(
                f"{group.names[0]!r} cannot be converted back to the layout of the base's files; merge in memory with "
                f"merge_and_unload(), then save_pretrained(). Expected:{listing(sorted(keys, key=by_number))}"
            )
        return stored

    def without_home(self) -> list[str]:
        """Parameters that the files do not store."""
        return [name for name in self.ties if self.home(name) is None and name not in self.groups]


def ties_of(model: nn.Module) -> dict[str, Tie]:
    """A model's Parameters, by each of their names, with all modules that hold them."""
    ties: dict[int, Tie] = {}
    by_name: dict[str, Tie] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{leaf}" if path else leaf
            tie = ties.setdefault(id(parameter), Tie(parameter))
            tie.names.append(name)
            tie.places.append((module, leaf))
    for tie in ties.values():
        by_name |= dict.fromkeys(tie.names, tie)
    return by_name


def widened(parameter: Tensor) -> nn.Parameter:
    """A parameter in at least fp32; integers stay as they are."""
    if not parameter.is_floating_point():
        return nn.Parameter(parameter, requires_grad=False)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return nn.Parameter(parameter.to(dtype), requires_grad=False)
