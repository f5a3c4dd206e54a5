"""Folding the adapters of a mapped model into new files, one module after another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.adapter import Adapter, Replace, Tensors
from ..core.attach import settle
from ..core.layer import AdapterLayer
from ..errors import CheckpointError, NotMergeable, listing
from ..model.peft_model import PeftModel
from ..targets.target import ParamTarget
from .mapped import Group, MappedModel, Tie, ties_of, widened
from .shards import INDEX, Entry, Writer, index_of, numbered


class Folded(NamedTuple):
    """A tensor of the base model with the adapters folded in."""

    before: Tensor | None
    """The original value; None if the base's files do not store it."""
    exact: Tensor
    """The new value, in at least fp32."""


class Merger:
    """Merges the active adapters of a mapped model.

    Args:
        embeddings: base embeddings that were saved with the adapters, by the parameters' names.

    Attributes:
        apart: names of parameters that were tied, and that have separate values after the merge.
        entries: the tensors of the new files, by key.

    Raises:
        NotMergeable: a method cannot be merged, or the architecture ties weights that the adapters separate.
        CheckpointError: neither the base's files nor the adapters have values for a parameter.
    """

    def __init__(self, mapped: MappedModel, model: PeftModel, embeddings: Tensors) -> None:
        self.mapped = mapped
        self.model = model
        self.state = model._state
        self.names = model._merge_order(None)
        self.layers = [layer for layer in self.state.layers.values() if self._is_adapted(layer)]
        for layer in self.layers:
            layer.check_merge(self.names)
        self.embeddings: Tensors = {}
        for name, tensor in embeddings.items():
            if name in mapped.ties and self._is_new(name, tensor):
                self.embeddings[name] = tensor
        mapped.brought = self.embeddings
        self._check_values()
        mapped.release()
        changed: set[str] = set()
        for layer in self.layers:
            changed.update(self.changed_by(layer))
        self.apart = self._untied(changed)
        self.entries = self._entries(changed)

    @property
    def size(self) -> int:
        """Bytes of the new files."""
        return sum(entry.bytes for entry in self.entries.values())

    def _is_adapted(self, layer: AdapterLayer) -> bool:
        return any(name in layer.adapters for name in self.names)

    def parts(self, layer: AdapterLayer) -> list[Adapter]:
        """The parts of all active adapters on a layer."""
        parts: list[Adapter] = []
        for name in self.names:
            if name in layer.adapters:
                parts.extend(layer.adapters[name].parts)
        return parts

    def changed_by(self, layer: AdapterLayer) -> list[str]:
        """Names of the base model's tensors that the adapters on a layer change."""
        base = layer.base_layer
        leaves: set[str] = set()
        for part in self.parts(layer):
            if isinstance(part, Replace):
                return [f"{layer.path}.{leaf}" for leaf in base.state_dict()]
            if isinstance(part.target, ParamTarget):
                leaves.add(part.target.name)
            else:
                leaves.update(("weight", "bias"))
        return [f"{layer.path}.{leaf}" for leaf in sorted(leaves) if base._parameters.get(leaf) is not None]

    # Checks, before anything is written

    def _is_new(self, name: str, tensor: Tensor) -> bool:
        """Whether an embedding that was saved with an adapter differs from the one in the base's files."""
        if not self.mapped.fits(name):
            return True
        base = self.mapped.shards.tensor(str(self.mapped.home(name)))
        return base.shape != tensor.shape or not torch.equal(base, tensor.to(base.dtype))

    def _check_values(self) -> None:
        """Raise unless the base's files or the adapters have values for each parameter."""
        ties = self.mapped.ties
        from_adapters: set[str] = set()
        for name in self.embeddings:
            from_adapters.update(ties[name].names)
        replaced = []
        for layer in self.layers:
            if any(isinstance(part, Replace) for part in self.parts(layer)):
                replaced.append(f"{layer.path}.")
        for name, tie in ties.items():
            is_from_files = name in self.mapped.groups or self.mapped.fits(name)
            is_from_adapters = name in from_adapters or name.startswith(tuple(replaced))
            if not is_from_files and not is_from_adapters:
                self._raise_without_values(name, tie)

    def _raise_without_values(self, name: str, tie: Tie) -> None:
        shape = tuple(tie.parameter.shape)
        home = self.mapped.home(name)
        stored = "nothing" if home is None else f"{self.mapped.shards.entries[home].shape}"
        raise CheckpointError(
            f"{name} needs values of shape {shape}, but the base's files have {stored} and the adapters none. Is "
            "this the base model that the adapters were trained on?"
        )

    def _untied(self, changed: set[str]) -> set[str]:
        """Names of tied parameters that the adapters separate; changes the model's config so that they are not tied."""
        ties = self.mapped.ties
        apart: set[str] = set()
        for name in changed:
            if name in ties and len(set(ties[name].names)) > 1:
                apart.update(ties[name].names)
        if not apart:
            return apart
        model_class = type(self.mapped.model)
        config = self.mapped.model.config
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
        with torch.device("meta"):
            fresh = ties_of(model_class._from_config(type(config).from_dict(config.to_dict())))
        still_tied = sorted(name for name in apart if len(set(fresh[name].names)) > 1)
        if still_tied:
            raise NotMergeable(
                f"{model_class.__name__} always ties these weights, regardless of its config, and the adapters "
                f"change some of them:{listing(still_tied)}"
            )
        return apart

    def _entries(self, changed: set[str]) -> dict[str, Entry]:
        """The tensors of the new files: those of the base, and in an additional file those with new names or shapes."""
        mapped = self.mapped
        names = {key: name for name, key in mapped.homes.items()}
        is_same_class = type(mapped.model).__name__ in (mapped.model.config.architectures or ())
        kept: dict[str, Entry] = {}
        added: dict[str, Entry] = {}
        for key, entry in mapped.shards.entries.items():
            if key in mapped.strays and not is_same_class:
                continue
            tie = mapped.ties.get(names.get(key, ""))
            shape = entry.shape if tie is None else tuple(tie.parameter.shape)
            if shape == entry.shape:
                kept[key] = entry
            else:
                added[key] = replace(entry, shape=shape)
        default_dtype = _most_common_dtype(kept)
        for name in sorted(self._without_key(changed)):
            home = mapped.home(name)
            dtype = default_dtype if home is None else mapped.shards.entries[home].dtype
            added[name] = Entry("", dtype, tuple(mapped.ties[name].parameter.shape))
        return _with_file_names(kept, added, list(mapped.shards.files))

    def _without_key(self, changed: set[str]) -> set[str]:
        """Parameters that are written although the base's files have no key for them."""
        names = set(self.apart)
        for name in self.mapped.without_home():
            if name in changed or name in self.embeddings:
                names.add(name)
        return names - self.mapped.homes.keys()

    def _key(self, name: str) -> str:
        """A parameter's key in the new files."""
        if name in self.apart:
            return self.mapped.homes.get(name, name)
        return self.mapped.home(name) or name

    # Writing

    def write(self, folder: Path, progress: Callable[[int, int], None]) -> list[Rounded]:
        """Write the model's files; returns the rounding of each changed tensor."""
        metadata = self.mapped.shards.metadata | {"format": "pt"}
        with Writer(folder, self.entries, metadata) as writer:
            rounded = list(self._fold_all(writer, progress))
            self._copy_rest(writer)
        files = {entry.file for entry in self.entries.values()}
        if len(files) > 1:
            index = json.dumps(index_of(self.entries), indent=2)
            (folder / INDEX).write_text(index + "\n", encoding="utf-8")
        return rounded

    def _fold_all(self, writer: Writer, progress: Callable[[int, int], None]) -> Iterator[Rounded]:
        """Fold and write one layer after another, and yield the rounding of each changed tensor.

        The tensors of a group are written together, after the last layer that changes one of them.
        """
        last_layer: dict[int, AdapterLayer] = {}
        for layer in self.layers:
            for group in self._groups(layer):
                last_layer[id(group)] = layer
        waiting: dict[int, Tensors] = {}
        for done, layer in enumerate(self.layers, 1):
            for name, (before, exact) in self.fold(layer).items():
                new = self._rounded(name, exact)
                if before is not None and exact.is_floating_point():
                    yield compare(name, before, exact, new)
                group_of_name = self.mapped.groups.get(name)
                if group_of_name is None:
                    writer.put(self._key(name), new)
                else:
                    waiting.setdefault(id(group_of_name), {})[name] = new
            for group in self._groups(layer):
                if last_layer[id(group)] is layer:
                    self._write_group(writer, group, waiting.pop(id(group)))
            progress(done, len(self.layers))

    def _groups(self, layer: AdapterLayer) -> list[Group]:
        """The groups of the converted parameters that a layer's adapters change."""
        groups: dict[int, Group] = {}
        for name in self.changed_by(layer):
            if name in self.mapped.groups:
                group = self.mapped.groups[name]
                groups[id(group)] = group
        return list(groups.values())

    def _rounded(self, name: str, exact: Tensor) -> Tensor:
        """A new value in the dtype of the files."""
        group = self.mapped.groups.get(name)
        key = self._key(name) if group is None else group.keys[0][0]
        dtype = self.entries[key].dtype
        new = exact.to(dtype)
        if new.is_floating_point() and not bool(torch.isfinite(new).all()):
            raise NotMergeable(
                f"after the merge, {name!r} has values that are not finite in {dtype}; check the adapter"
            )
        return new

    @torch.no_grad()
    def fold(self, layer: AdapterLayer) -> dict[str, Folded]:
        """The tensors that the adapters on a layer change, by name."""
        names = self.changed_by(layer)
        parameters = [name for name in names if name in self.mapped.ties]
        self.mapped.bind(parameters)
        if self._groups(layer):  # adapters on weights that were on the meta device are not in fp32 yet
            for adapter in self.names:
                settle(self.model.get_base_model(), self.state, adapter)
        before = layer.base_layer.state_dict()
        after = self._merged(layer)
        self.mapped.release(parameters)
        folded = {}
        without_values = []
        for name in names:
            leaf = name.removeprefix(f"{layer.path}.")
            if after[leaf].is_meta:
                without_values.append(name)
            is_stored = name in parameters and (name in self.mapped.groups or self.mapped.fits(name))
            folded[name] = Folded(before[leaf] if is_stored else None, after[leaf])
        if without_values:
            raise NotMergeable(
                f"the adapter on {layer.path!r} was initialised from weights that the base's files store in another "
                f"layout; merge in memory with merge_and_unload(). Without values:{listing(without_values)}"
            )
        return folded

    def _merged(self, layer: AdapterLayer) -> Tensors:
        """The state dict of a layer's module with the adapters merged in at least fp32."""
        base = layer.base_layer
        parameters = dict(base._parameters)
        for leaf, parameter in parameters.items():
            if parameter is not None and not parameter.is_meta:
                base._parameters[leaf] = widened(parameter)
        layer.merge(self.names)
        merged = layer.base_layer.state_dict()
        layer.unmerge()
        base._parameters.update(parameters)
        return merged

    def _write_group(self, writer: Writer, group: Group, new: Tensors) -> None:
        """Write all tensors of a group, with the base's values for parameters that no adapter changes."""
        self.mapped.bind([name for name in group.names if name not in new])
        values = {}
        for name in group.names:
            values[name] = new[name] if name in new else self.mapped.value(name)
        for key, tensor in self.mapped.reverted(group, values).items():
            writer.put(key, tensor)
        self.mapped.release(group.names)

    def _copy_rest(self, writer: Writer) -> None:
        """Write embeddings saved with an adapter, weights that are no longer tied, and tensors that did not change."""
        shards = self.mapped.shards
        for name, tensor in self.embeddings.items():
            key = self._key(name)
            if key in writer.left:
                writer.put(key, tensor.to(self.entries[key].dtype))
        for name in self.apart - self.mapped.homes.keys():
            if name in writer.left:
                writer.put(name, shards.tensor(str(self.mapped.home(name))))
        for key in sorted(writer.left):
            writer.put(key, shards.tensor(key))


def _most_common_dtype(entries: Mapping[str, Entry]) -> torch.dtype:
    """The floating-point dtype of most parameters; fp32 if there is none."""
    counts: dict[torch.dtype, int] = {}
    for entry in entries.values():
        if entry.dtype.is_floating_point:
            counts[entry.dtype] = counts.get(entry.dtype, 0) + math.prod(entry.shape)
    return max(counts, key=counts.__getitem__, default=torch.float32)


def _with_file_names(kept: dict[str, Entry], added: dict[str, Entry], files: list[str]) -> dict[str, Entry]:
    """All entries with the new files' names: the base's names, unless there is one more file."""
    used = {entry.file for entry in kept.values()}
    old_names = [file for file in files if file in used]
    if not added:
        return dict(kept)
    *new_names, last = numbered(len(old_names) + 1)
    renamed = dict(zip(old_names, new_names, strict=True))
    entries = {}
    for key, entry in kept.items():
        entries[key] = replace(entry, file=renamed[entry.file])
    for key, entry in added.items():
        entries[key] = replace(entry, file=last)
    return entries


CHUNK = 1 << 24


@dataclass(frozen=True)
class Rounded:
    """What rounding did to one merged tensor."""

    name: str
    dtype: str
    change: float
    """Frobenius norm of dW = W' - W, W' summed in at least fp32."""
    error: float
    """Frobenius norm of the rounding error of W'."""
    moved: int
    """Number of entries that dW changes."""
    unmoved: int
    """Number of these entries that rounding returns to their old value."""

    @property
    def lost(self) -> float:
        """The rounding error relative to dW."""
        return self.error / self.change if self.change else 0.0


def share_lost(tensors: Sequence[Rounded]) -> float:
    """The rounding error of all tensors relative to dW."""
    change = 0.0
    error = 0.0
    for tensor in tensors:
        change = math.hypot(change, tensor.change)
        error = math.hypot(error, tensor.error)
    return error / change if change else 0.0


def share_unmoved(tensors: Sequence[Rounded]) -> float:
    """The share of the entries changed by dW that rounding returns to their old value."""
    moved = 0
    unmoved = 0
    for tensor in tensors:
        moved += tensor.moved
        unmoved += tensor.unmoved
    return unmoved / max(1, moved)


def compare(name: str, before: Tensor, exact: Tensor, new: Tensor) -> Rounded:
    """Measure the rounding from W' to its stored value, in chunks."""
    squared_change = 0.0
    squared_error = 0.0
    moved = 0
    unmoved = 0
    chunks = (t.reshape(-1).split(CHUNK) for t in (before, exact, new))
    for W, W1, rounded in zip(*chunks, strict=True):
        wide = W.to(W1.dtype)
        is_moved = wide != W1
        is_unmoved = is_moved & (rounded == W)
        squared_change += _squared_norm(W1 - wide)
        squared_error += _squared_norm(rounded.to(W1.dtype) - W1)
        moved += int(is_moved.sum())
        unmoved += int(is_unmoved.sum())
    dtype = str(new.dtype).removeprefix("torch.")
    return Rounded(name, dtype, squared_change**0.5, squared_error**0.5, moved, unmoved)


def _squared_norm(t: Tensor) -> float:
    return float(t.double().square().sum())
