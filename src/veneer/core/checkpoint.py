"""Reading and writing adapters in Hugging Face PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A key is the place of a part in the model, then the attribute's name. Saving and loading are one walk over the parts.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, listing
from ..files.confine import confine
from ..files.find import find_file, find_weights
from ..files.read import PICKLE_NAME, WEIGHTS_NAME, computable, read_json, read_pickle, read_tensors
from ..files.write import identity, replacing, write_tensors
from ..targets.quantised import quantised
from ..targets.target import kind_of
from ..targets.walk import walk
from . import embeddings
from . import provenance as own_notes
from .adapter import Adapter, Replace, Tensors
from .config import CONFIG_NAME, METHODS, Config, PromptConfig
from .prompt import Prompt
from .state import State

NEXT_NAME = f".{CONFIG_NAME}.next"
"""The config of a save that is under way: a crash between its two renames leaves it beside the new tensors."""


# Where things are


def parts(state: State, name: str) -> Iterator[tuple[str, Adapter | Prompt | nn.Module]]:
    """(key prefix, part) of everything saved under an adapter's name."""
    below = "base_model." if isinstance(state.configs[name], PromptConfig) else "base_model.model."
    for path, adapter in state.adapters(name).items():
        for part in adapter.parts:
            yield f"{below if isinstance(part, Replace) else 'base_model.model.'}{path}.{part.key}", part
    if name in state.shared:
        yield "base_model.", state.shared[name]
    if name in state.prompts:
        yield "", state.prompts[name]


def export(part: Any) -> Tensors:
    return part.export() if hasattr(part, "export") else part.state_dict()


def slots(state: State, name: str) -> Tensors:
    """Every tensor of an adapter by its key in the file."""
    return {prefix + key: t for prefix, part in parts(state, name) for key, t in export(part).items()}


def repeats(state: State, name: str) -> dict[str, str]:
    """Keys that a file may hold besides the slots, each with the slot whose tensor it repeats."""
    layers = [(prefix, part.repeats()) for prefix, part in parts(state, name) if isinstance(part, Adapter)]
    return {prefix + key: f"base_model.model.{whose}" for prefix, own in layers for key, whose in own.items()}


# Writing


def collect(model: nn.Module, state: State, name: str, whole: bool | None) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by key, notes) of an adapter, whole and on the CPU. Every process of a sharded run must take part."""
    if any(tuple(getattr(p, "ds_shape", p.shape)) != tuple(p.shape) for p in state.parameters(name)):
        raise CheckpointError(f"{name!r} is sharded by DeepSpeed's ZeRO-3; save it inside GatheredParameters")
    tensors = slots(state, name) | embeddings.beside(model, state, state.configs[name], whole)
    notes: dict[str, Any] = {"base": own_notes.fingerprint(base_weights(model, state, name))}
    notes |= {"rounded": True} if is_rounded(state, name) else {}
    seen: set[int] = set()
    tensors = {key: _whole(t, seen) for key, t in tensors.items()}
    _check_finite(tensors, f"adapter {name!r}, which is not saved,")
    return tensors, notes


def write(directory: Path, tensors: Tensors, notes: dict[str, Any], config: Config) -> None:
    """Write one adapter. A crash leaves the old one or the new one: `load` can tell which config is the tensors'."""
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory, NEXT_NAME)
    with replacing(directory / WEIGHTS_NAME) as temporary:
        write_tensors(temporary, tensors, own_notes.metadata(notes, tensors, config))
    (directory / NEXT_NAME).replace(directory / CONFIG_NAME)


def _whole(t: Tensor, seen: set[int]) -> Tensor:
    """A tensor on the CPU: gathered if sharded, contiguous, and sharing memory with none of those whose are `seen`."""
    t = t.full_tensor() if hasattr(t, "full_tensor") else t
    if t.is_meta:
        raise CheckpointError("the adapter has no values yet (it lies on the meta device); there is nothing to save")
    t, memory = t.detach(), t.untyped_storage()
    is_own = t.is_contiguous() and memory.nbytes() == t.nbytes and memory.data_ptr() not in seen
    seen.add(memory.data_ptr())
    return t.to("cpu", copy=not is_own).contiguous()


# Reading


def load(
    source: str | Path,
    config: Config | None = None,
    *,
    allow_pickle: bool = False,
    follow_paths: bool = False,
    **hub: Any,
) -> tuple[Config, Tensors, dict[str, Any]]:
    """(config, tensors by key, veneer's own notes) of a saved adapter.

    Args:
        config: the caller's own, instead of the file's.
        allow_pickle: read a pickled tensor file where there is no other.
        follow_paths: paths in the file's config may lead out of its directory.

    Raises:
        CheckpointError: a file is missing, broken, or the config is not the one the tensors were written with.
    """
    if config is not None:
        return copy.copy(config), *read(source, allow_pickle=allow_pickle, **hub)
    path = find_file(source, CONFIG_NAME, **hub)
    found, config = identity(path), Config.from_dict(read_json(path))
    tensors, notes = read(source, allow_pickle=allow_pickle, **hub)
    other = own_notes.unlike(config, notes)
    if other:
        with contextlib.suppress(CheckpointError):  # there is none, unless a save was cut off or is under way
            config = Config.from_dict(read_json(path.with_name(NEXT_NAME)))
            other = own_notes.unlike(config, notes)
    if other and identity(path) != found:  # another process saved in the meantime
        return load(source, allow_pickle=allow_pickle, follow_paths=follow_paths, **hub)
    if other:
        raise CheckpointError(
            f"{str(path)!r} is not the config that the tensors beside it were written with:{listing(other)}\n"
            "Undo the change, or say that it is meant: config=Config.from_pretrained(...)"
        )
    confine(config, path.parent, follow_paths)
    return config, tensors, notes


def read(source: str | Path, *, allow_pickle: bool = False, **hub: Any) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by key, veneer's own notes) of an adapter's weight file.

    Raises:
        CheckpointError: no file, a pickle, a broken file, or values that are not finite.
    """
    path = find_weights(source, allow_pickle=allow_pickle, **hub)
    found, metadata = (read_pickle(path), {}) if path.name == PICKLE_NAME else read_tensors(path)
    _check_finite(found, repr(str(path)))
    names = renamed()
    tensors = {_todays(key, names): t for key, t in found.items()}
    if len(tensors) < len(found):
        twice = [key for key in found if _todays(key, names) != key and _todays(key, names) in found]
        raise CheckpointError(f"{str(path)!r} holds tensors under an old and a new name:{listing(twice)}")
    return computable(tensors), own_notes.read(metadata, found)


def _check_finite(tensors: Tensors, what: str) -> None:
    if broken := not_finite(tensors):
        raise CheckpointError(f"{what} holds values that are not finite in:{listing(broken)}")


def not_finite(tensors: Tensors) -> list[str]:
    """The keys of tensors that hold values that are not finite; a sum that is finite has no other terms."""
    floating = ((key, t.float() if t.element_size() == 1 else t) for key, t in tensors.items() if t.is_floating_point())
    return [key for key, t in floating if not math.isfinite(t.float().sum()) and not torch.isfinite(t).all()]


def renamed() -> dict[str, str]:
    """Today's names of attributes that methods' older files call otherwise."""
    return {old: new for config in METHODS.values() for old, new in config.renamed.items()}


def _todays(key: str, names: Mapping[str, str]) -> str:
    path, dot, attribute = key.rpartition(".")
    return path + dot + names.get(attribute, attribute)


def check(state: State, name: str, tensors: Tensors) -> None:
    """Raise CheckpointError unless `tensors` are exactly those of the adapter, in key and shape."""
    expected = slots(state, name)
    copies = {k: whose for k, whose in repeats(state, name).items() if k in tensors and whose in tensors}
    extra = {k for k in tensors if embeddings.is_one(k)} | copies.keys()
    missing = [k for k in expected if k not in tensors]
    unlike = [k for k, whose in copies.items() if not _repeats(tensors[k], tensors[whose])]
    unexpected = [k for k in tensors if k not in expected and k not in extra]
    both = [(k, tensors[k], t) for k, t in expected.items() if k in tensors]
    shapes = [
        f"{k}: {tuple(found.shape)} in the file, {tuple(t.shape)} in the model"
        for k, found, t in both
        if found.shape != t.shape
    ]
    kinds = [
        f"{k}: {found.dtype} in the file" for k, found, t in both if found.is_floating_point() != t.is_floating_point()
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "of another kind": kinds}
    problems |= {"unlike those they should repeat": unlike}
    if found := [f"{len(keys)} {how}:{listing(keys)}" for how, keys in problems.items() if keys]:
        raise CheckpointError(f"the file does not fit adapter {name!r} on this model; tensors " + "\nand ".join(found))


def is_rounded(state: State, name: str) -> bool:
    """Whether an adapter stands on quantised weights, which are near the pretrained ones."""
    return any(state.layers[path].target.is_quantised for path in state.adapters(name))


def check_fit(
    model: Any, state: State, name: str, tensors: Tensors, notes: Mapping[str, Any], check_base: bool = True
) -> None:
    """Raise unless a file's tensors are an adapter's, whole, and trained on this base model."""
    check(state, name, tensors)
    own_notes.check_whole(notes)
    if check_base:
        own_notes.check_base(base_weights(model, state, name), notes, is_rounded(state, name))


def _repeats(t: Tensor, first: Tensor) -> bool:
    """They are the same numbers; a tied module may see its weight from the other side."""
    return torch.equal(t, first) or (first.dim() == 2 and torch.equal(t, first.T))


def absorb(state: State, name: str, tensors: Tensors) -> None:
    """Put checked tensors into the adapter."""
    for prefix, part in parts(state, name):
        own = {key: tensors[prefix + key] for key in export(part) if prefix + key in tensors}
        if hasattr(part, "absorb"):
            part.absorb(own)
        else:
            part.load_state_dict(own, strict=False, assign=any(t.is_meta for t in part.state_dict().values()))


# The base model


def base_weights(model: Any, state: State, name: str) -> dict[str, Tensor]:
    """Pretrained weights an adapter stands on, by path; under a prompt the input embedding, by "".

    Without those that are not whole in memory.
    """
    found = {p: _pretrained(state, p) for p, a in state.adapters(name).items() if not isinstance(a, Replace)}
    found |= {"": model.get_input_embeddings().weight} if name in state.prompts else {}
    whole = {path: W for path, W in found.items() if W is not None}
    return {path: W for path, W in whole.items() if not W.is_meta and not hasattr(W, "full_tensor")}


def _pretrained(state: State, path: str) -> Tensor | None:
    """The pretrained weight of a layer; of a block, which has none of its own, that of the first matrix inside."""
    target = state.layers[path].target
    if target.kind != "block":
        return target.original_weight() if target.is_readable else None
    for below, module in walk(target.base, path):
        if kind_of(module).kind == "linear" and quantised(module) is None:
            return state.layers[below].target.original_weight() if below in state.layers else module.weight
    return None
