"""Folding the adapters of a mapped model into new files, one module after another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter, Replace, Tensors
from ..core.attach import settle
from ..core.layer import AdapterLayer
from ..errors import CheckpointError, NotMergeable, listing
from ..model.peft_model import PeftModel
from ..targets.target import ParamTarget
from .mapped import Group, MappedModel, ties_of, widened
from .shards import INDEX, Entry, Writer, index_of, numbered


class Merger:
    """Merges the active adapters of a mapped model.

    Args:
        embeddings: base embeddings that came with the adapters, by the parameters' names.

    Attributes:
        apart: names of parameters that were tied, and that the merge gives values of their own.
        entries: what the new files will hold.

    Raises:
        NotMergeable: a method has no form as a weight, or the architecture ties what the adapters set apart.
        CheckpointError: a parameter has values from nowhere.
    """

    def __init__(self, mapped: MappedModel, model: PeftModel, embeddings: Tensors) -> None:
        self.mapped, self.model, self.state = mapped, model, model._state
        self.names = model._merge_order(None)
        self.layers = [layer for layer in self.state.layers.values() if any(n in layer.adapters for n in self.names)]
        for layer in self.layers:
            layer.check_merge(self.names)
        self.embeddings = {name: t for name, t in embeddings.items() if name in mapped.ties and self._is_new(name, t)}
        self._check_homes()
        mapped.release()
        changed = {name for layer in self.layers for name in self.changed_by(layer)}
        self.apart = self._untied(changed)
        self.entries = self._entries(changed)

    @property
    def size(self) -> int:
        """Bytes of the new files."""
        return sum(entry.bytes for entry in self.entries.values())

    def parts(self, layer: AdapterLayer) -> list[Adapter]:
        return [part for name in self.names if name in layer.adapters for part in layer.adapters[name].parts]

    def changed_by(self, layer: AdapterLayer) -> list[str]:
        """Names of the base model's tensors to which the adapters on a layer give new values."""
        parts, base = self.parts(layer), layer.base_layer
        if any(isinstance(part, Replace) for part in parts):
            return [f"{layer.path}.{leaf}" for leaf in base.state_dict()]
        leaves = {part.target.name for part in parts if isinstance(part.target, ParamTarget)}
        leaves |= {"weight", "bias"} if any(not isinstance(part.target, ParamTarget) for part in parts) else set()
        return [f"{layer.path}.{leaf}" for leaf in sorted(leaves) if base._parameters.get(leaf) is not None]

    # Looking, before anything is written

    def _is_new(self, name: str, tensor: Tensor) -> bool:
        """An adapter's file has another embedding than the base's files."""
        if not self.mapped.fits(name):
            return True
        base = self.mapped.shards.tensor(str(self.mapped.home(name)))
        return base.shape != tensor.shape or not torch.equal(base, tensor.to(base.dtype))

    def _check_homes(self) -> None:
        """Raise unless each parameter has values: from the base's files, or from the adapters'."""
        copied = [f"{layer.path}." for layer in self.layers if any(isinstance(p, Replace) for p in self.parts(layer))]
        brought = {n for name in self.embeddings for n in self.mapped.ties[name].names}
        for name in self.mapped.ties:
            from_files = name in self.mapped.groups or self.mapped.fits(name)
            if not (from_files or name in brought or name.startswith(tuple(copied))):
                shape, home = tuple(self.mapped.ties[name].parameter.shape), self.mapped.home(name)
                found = "nothing" if home is None else f"{self.mapped.shards.entries[home].shape}"
                raise CheckpointError(
                    f"{name} needs values of shape {shape}; the base's files have {found}, the adapters' none. Is it "
                    "the base that the adapters were trained on?"
                )

    def _untied(self, changed: set[str]) -> set[str]:
        """Names that shared a weight of which the adapters change some, told apart in the config."""
        ties = self.mapped.ties
        touched = {name for name in changed if name in ties and len(set(ties[name].names)) > 1}
        apart = {n for name in touched for n in ties[name].names}
        if not apart:
            return apart
        config = self.mapped.model.config
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        with torch.device("meta"):
            fresh = ties_of(type(self.mapped.model)._from_config(type(config).from_dict(config.to_dict())))
        still = sorted(name for name in apart if len({*fresh[name].names}) > 1)
        if still:
            raise NotMergeable(
                f"{type(self.mapped.model).__name__} ties these weights whatever its config says, and the adapters "
                f"change some of them:{listing(still)}"
            )
        return apart

    def _entries(self, changed: set[str]) -> dict[str, Entry]:
        """What the new files hold: the base's tensors; those of new names or shapes in a file of their own."""
        mapped, shards = self.mapped, self.mapped.shards
        names = {key: name for name, key in mapped.homes.items()}
        is_same_class = type(mapped.model).__name__ in (mapped.model.config.architectures or ())
        kept: dict[str, Entry] = {}
        added: dict[str, Entry] = {}
        for key, entry in shards.entries.items():
            tie = mapped.ties.get(names.get(key, ""))
            shape = entry.shape if tie is None else tuple(tie.parameter.shape)
            if is_same_class or key not in mapped.strays:
                (kept if shape == entry.shape else added)[key] = Entry(entry.file, entry.dtype, shape)
        common = _commonest(kept)
        new = {*self.apart, *(name for name in mapped.without_home() if name in changed or name in self.embeddings)}
        for name in sorted(new - mapped.homes.keys()):
            home = mapped.home(name)
            dtype = common if home is None else shards.entries[home].dtype
            added[name] = Entry("", dtype, tuple(mapped.ties[name].parameter.shape))
        return _placed(kept, added, list(shards.files))

    def _key(self, name: str) -> str:
        """The key under which a parameter stands in the new files."""
        if name in self.apart:
            return self.mapped.homes.get(name, name)
        return self.mapped.home(name) or name

    # Writing

    def write(self, folder: Path, progress: Callable[[int, int], None]) -> list[Rounded]:
        """Write the model's files; returns what was rounded."""
        with Writer(folder, self.entries, self.mapped.shards.metadata | {"format": "pt"}) as writer:
            rounded = list(self._fold_all(writer, progress))
            self._copy_rest(writer)
        if len({entry.file for entry in self.entries.values()}) > 1:
            (folder / INDEX).write_text(json.dumps(index_of(self.entries), indent=2) + "\n", encoding="utf-8")
        return rounded

    def _fold_all(self, writer: Writer, progress: Callable[[int, int], None]) -> Iterator[Rounded]:
        """Tensors that the files have in another form wait until all adapters have been folded into them."""
        last = {id(self.mapped.groups[n]): layer for layer in self.layers for n in self._grouped(layer)}
        waiting: dict[int, Tensors] = {}
        for done, layer in enumerate(self.layers, 1):
            groups = {id(self.mapped.groups[n]): self.mapped.groups[n] for n in self._grouped(layer)}
            for name, (before, exact) in self.fold(layer).items():
                new = self._rounded(name, exact)
                if before is not None and exact.is_floating_point():
                    yield rounding(name, before, exact, new)
                if name in self.mapped.groups:
                    waiting.setdefault(id(self.mapped.groups[name]), {})[name] = new
                else:
                    writer.put(self._key(name), new)
            for key, group in groups.items():
                if last[key] is layer:
                    self._write_group(writer, group, waiting.pop(key))
            progress(done, len(self.layers))

    def _grouped(self, layer: AdapterLayer) -> list[str]:
        return [name for name in self.changed_by(layer) if name in self.mapped.groups]

    def _rounded(self, name: str, exact: Tensor) -> Tensor:
        group = self.mapped.groups.get(name)
        dtype = self.entries[self._key(name) if group is None else group.keys[0][0]].dtype
        new = exact.to(dtype)
        if new.is_floating_point() and not bool(torch.isfinite(new).all()):
            raise NotMergeable(f"merged, {name!r} has values that are not finite in {dtype}")
        return new

    @torch.no_grad()
    def fold(self, layer: AdapterLayer) -> dict[str, tuple[Tensor | None, Tensor]]:
        """(the old value where the base has one, the new one in at least fp32) of each tensor the adapters change."""
        names, base = self.changed_by(layer), layer.base_layer
        known = [name for name in names if name in self.mapped.ties]
        self.mapped.bind(known)
        if self._grouped(layer):
            for adapter in self.names:  # those on weights that were on meta have not been lifted to fp32
                settle(self.model.get_base_model(), self.state, adapter)
        leaves = {name: name.removeprefix(f"{layer.path}.") for name in names}
        before, old = base.state_dict(), dict(base._parameters)
        base._parameters.update({leaf: widened(p) for leaf, p in old.items() if p is not None and not p.is_meta})
        layer.merge(self.names)
        after = layer.base_layer.state_dict()
        layer.unmerge()
        base._parameters.update(old)
        self.mapped.release(known)
        self._check_read(layer, [name for name, leaf in leaves.items() if after[leaf].is_meta])
        has = {name for name in known if name in self.mapped.groups or self.mapped.fits(name)}
        return {name: (before[leaf] if name in has else None, after[leaf]) for name, leaf in leaves.items()}

    def _check_read(self, layer: AdapterLayer, unread: list[str]) -> None:
        if unread:
            raise NotMergeable(
                f"the adapter on {layer.path!r} starts from weights that the base's files hold in another form; merge "
                f"in memory, with merge_and_unload(). Without values:{listing(unread)}"
            )

    def _write_group(self, writer: Writer, group: Group, new: Tensors) -> None:
        """A group goes back to the files whole, with what of it no adapter changes."""
        self.mapped.bind([name for name in group.names if name not in new])
        whole = {name: new[name] if name in new else self.mapped.value(name) for name in group.names}
        for key, tensor in self.mapped.reverted(group, whole).items():
            writer.put(key, tensor)
        self.mapped.release(group.names)

    def _copy_rest(self, writer: Writer) -> None:
        """Embeddings that came with an adapter, weights that are no longer tied, and all that no adapter changes."""
        for name, tensor in self.embeddings.items():
            key = self._key(name)
            if key in writer.left:
                writer.put(key, tensor.to(self.entries[key].dtype))
        for name in self.apart - self.mapped.homes.keys():
            if name in writer.left:
                writer.put(name, self.mapped.shards.tensor(str(self.mapped.home(name))))
        for key in sorted(writer.left):
            writer.put(key, self.mapped.shards.tensor(key))


def _commonest(entries: Mapping[str, Entry]) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for entry in entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + math.prod(entry.shape)
    return max((d for d in sizes if d.is_floating_point), key=lambda d: sizes[d], default=torch.float32)


def _placed(kept: dict[str, Entry], added: dict[str, Entry], files: list[str]) -> dict[str, Entry]:
    """Entries with the names of the new files: the base's own, unless a file is added."""
    own = [file for file in files if any(entry.file == file for entry in kept.values())]
    names: Any = (
        dict(zip((*own, ""), numbered(len(own) + 1), strict=True)) if added else dict(zip(own, own, strict=True))
    )
    entries = {key: Entry(names[e.file], e.dtype, e.shape) for key, e in kept.items()}
    return entries | {key: Entry(names[""], e.dtype, e.shape) for key, e in added.items()}


CHUNK = 1 << 24


@dataclass(frozen=True)
class Rounded:
    """One tensor that a merge changed."""

    name: str
    dtype: str
    change: float
    """Frobenius norm of dW = W' - W, W' summed in at least fp32."""
    error: float
    """Frobenius norm of the rounding error of W'."""
    moved: int
    """Numbers that dW changes."""
    unmoved: int
    """Those among them that rounding brings back to what they were."""

    @property
    def lost(self) -> float:
        """The rounding error as a share of dW."""
        return self.error / self.change if self.change else 0.0


def lost(tensors: Sequence[Rounded]) -> float:
    """The rounding error of all tensors as a share of dW."""
    change = math.hypot(*(t.change for t in tensors))
    return math.hypot(*(t.error for t in tensors)) / change if change else 0.0


def unmoved(tensors: Sequence[Rounded]) -> float:
    """The share of the numbers that dW changes and rounding brings back."""
    return sum(t.unmoved for t in tensors) / max(1, sum(t.moved for t in tensors))


def rounding(name: str, before: Tensor, exact: Tensor, new: Tensor) -> Rounded:
    """Compare W, W' and W' rounded, a piece at a time."""
    change = error = 0.0
    moved = back = 0
    pieces = (t.reshape(-1).split(CHUNK) for t in (before, exact, new))
    for W, W1, rounded in zip(*pieces, strict=True):
        wide = W.to(W1.dtype)
        moves = wide != W1
        change += float((W1 - wide).double().square().sum())
        error += float((rounded.to(W1.dtype) - W1).double().square().sum())
        moved += int(moves.sum())
        back += int((moves & (rounded == W)).sum())
    return Rounded(name, str(new.dtype).removeprefix("torch."), change**0.5, error**0.5, moved, back)
