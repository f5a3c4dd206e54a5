"""Reading and writing adapters in Hugging Face PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A key is the path of a module followed by the name of an attribute. `slots` lists an adapter's tensors by key, for
saving and for loading. `load` reads a saved adapter, and `fill` copies it into an attached one; nothing else loads
adapters.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, VeneerError, listing
from ..files.confine import confine
from ..files.find import find_file, find_weights
from ..files.gguf.cache import origin_of
from ..files.read import PICKLE_NAME, PREFIX, WEIGHTS_NAME, computable, read_json, read_pickle, read_tensors
from ..files.write import identity, replacing, write_tensors
from ..targets.quantised import quantised
from ..targets.target import kind_of
from ..targets.walk import walk
from . import embeddings, provenance, remainder, trial
from .adapter import Adapter, Replace, Tensors
from .config import CONFIG_NAME, METHODS, Config, PromptConfig
from .placement import settle
from .prompt import Prompt
from .state import State

NEXT_NAME = f".{CONFIG_NAME}.next"
"""The config of a save in progress. A crash between the two renames of a save leaves it next to the new tensors."""


class Saved(NamedTuple):
    """An adapter as it was read from its files."""

    config: Config
    tensors: Tensors
    """By key."""
    notes: dict[str, Any]
    """What veneer recorded about the adapter's origin; see `provenance`."""
    training: Tensors = {}
    """What only training reads, by key; see `remainder`."""


def with_other_keys(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> Tensors:
    """A file's tensors with keys rewritten, each by the first regular expression found in it, behind `PREFIX`.

    Raises:
        CheckpointError: two keys become the same.
    """
    rewritten: Tensors = {}
    for key, tensor in tensors.items():
        new = _other_key(key, key_mapping or {})
        if new in rewritten:
            raise CheckpointError(f"key_mapping turns {key!r} and another key into the same key, {new!r}")
        rewritten[new] = tensor
    return rewritten


def _other_key(key: str, key_mapping: Mapping[str, str]) -> str:
    prefix = ""
    if key.startswith("base_model."):
        prefix = PREFIX if key.startswith(PREFIX) else "base_model."
    inner = key.removeprefix(prefix)
    for pattern, replacement in key_mapping.items():
        changed, count = re.subn(pattern, replacement, inner)
        if count:
            return prefix + changed
    return key


class Given(NamedTuple):
    """The values of a model at another moment, or gathered from its shards."""

    adapter: Tensors
    """An adapter's tensors by key."""
    base: Tensors
    """Tensors of the whole model by name; the name of a base embedding is also its key."""


# Keys


def parts(state: State, name: str) -> Iterator[tuple[str, Adapter | Prompt | nn.Module]]:
    """Yield (key prefix, module) for every module that is saved under an adapter's name."""
    is_prompt = isinstance(state.configs[name], PromptConfig)
    for path, adapter in state.adapters(name).items():
        for part in adapter.parts:
            # PEFT's prompt models hold the base model directly, so the paths in it have one level less
            wrapper = "base_model." if is_prompt and isinstance(part, Replace) else PREFIX
            yield f"{wrapper}{path}.{part.key}", part
    if name in state.shared:
        yield "base_model.", state.shared[name]
    if name in state.prompts:
        yield "", state.prompts[name]


def export(part: Any) -> Tensors:
    """The tensors of a part to save, by attribute name."""
    return part.export() if hasattr(part, "export") else part.state_dict()


def slots(state: State, name: str) -> Tensors:
    """All tensors of an adapter, by key."""
    tensors = {}
    for prefix, part in parts(state, name):
        for key, tensor in export(part).items():
            tensors[prefix + key] = tensor
    return tensors


def repeats(state: State, name: str) -> dict[str, str]:
    """Additional keys that a file may contain, each with the key of the tensor that it duplicates."""
    repeated = {}
    for prefix, part in parts(state, name):
        if isinstance(part, Adapter):
            for key, slot in part.repeats().items():
                repeated[prefix + key] = PREFIX + slot
    return repeated


# Writing


def collect(
    model: nn.Module, state: State, name: str, whole: bool | None, given: Given | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by key, notes) of an adapter, gathered on the CPU. In a sharded run, every process must call this.

    Args:
        whole: whether to save the base embeddings too; None: follow PEFT's rule.
        given: values to save in place of those in the model.
    """
    tensors = embeddings.to_save(model, state, state.configs[name], whole)
    if given is None:
        _checkgathered(state, name)
        tensors |= slots(state, name)
    else:
        for key in tensors.keys() & given.base.keys():
            tensors[key] = given.base[key]
        tensors |= given.adapter
    notes: dict[str, Any] = {"base": provenance.fingerprint(base_weights(model, state, name))}
    if is_rounded(state, name):
        notes["rounded"] = True
    origin = origin_of(getattr(getattr(model, "config", None), "name_or_path", None) or "")
    if origin is not None:
        notes["file"] = {"name": origin.name, "sha256": origin.sha256}
    prepared = provenance.preparation(model)
    if prepared:
        notes["preparation"] = prepared
    memory: set[int] = set()
    on_cpu = {key: gathered(tensor, memory) for key, tensor in tensors.items()}
    _check_finite(on_cpu, f"adapter {name!r} is not saved because it")
    return on_cpu, notes


def write(directory: Path, tensors: Tensors, notes: dict[str, Any], config: Config) -> None:
    """Write one adapter. A crash leaves the old one or the new one: `load` picks the config that fits the tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory, NEXT_NAME)
    with replacing(directory / WEIGHTS_NAME) as temporary:
        write_tensors(temporary, tensors, provenance.metadata(notes, tensors, config))
    (directory / NEXT_NAME).replace(directory / CONFIG_NAME)


def _checkgathered(state: State, name: str) -> None:
    for parameter in state.parameters(name):
        full_shape = getattr(parameter, "ds_shape", parameter.shape)
        if tuple(full_shape) != tuple(parameter.shape):
            raise CheckpointError(
                f"adapter {name!r} is sharded by DeepSpeed's ZeRO-3; save it inside a GatheredParameters block"
            )


def gathered(tensor: Tensor, memory: set[int]) -> Tensor:
    """A contiguous copy of a tensor on the CPU, including its shards in other processes.

    Args:
        memory: addresses of storages in use, which the copy may not share; the tensor's own address is added.
    """
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    if tensor.is_meta:
        raise CheckpointError("the adapter has no values to save: it is on the meta device; load its values first")
    tensor = tensor.detach()
    storage = tensor.untyped_storage()
    is_alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in memory
    memory.add(storage.data_ptr())
    needs_copy = not (is_alone and tensor.is_contiguous())
    return tensor.to("cpu", copy=needs_copy).contiguous()


# Reading


def load(
    source: str | Path,
    config: Config | None = None,
    *,
    allow_pickle: bool = False,
    follow_paths: bool = False,
    **hub: Any,
) -> Saved:
    """Read a saved adapter.

    Args:
        config: a config to use instead of the file's.
        allow_pickle: read a pickled tensor file if there is no other.
        follow_paths: allow paths in the config that lead out of its directory.

    Raises:
        CheckpointError: a file is missing or broken, or the config was changed after the tensors were written.
    """
    if config is not None:
        tensors, notes = read(source, allow_pickle=allow_pickle, **hub)
        return Saved(copy.copy(config), tensors, notes, remainder.read(source, notes, **hub))
    path = find_file(source, CONFIG_NAME, **hub)
    before = identity(path)
    config = Config.from_dict(read_json(path))
    tensors, notes = read(source, allow_pickle=allow_pickle, **hub)
    differences = provenance.differences(config, notes)
    if differences:
        with contextlib.suppress(CheckpointError):  # present if a save is in progress or was interrupted
            config = Config.from_dict(read_json(path.with_name(NEXT_NAME)))
            differences = provenance.differences(config, notes)
    if differences and identity(path) != before:  # another process saved in the meantime
        return load(source, allow_pickle=allow_pickle, follow_paths=follow_paths, **hub)
    if differences:
        raise CheckpointError(
            f"{str(path)!r} was changed after the tensors next to it were written:{listing(differences)}\n"
            "Undo the change or, if it is intended, pass config=Config.from_pretrained(...)"
        )
    confine(config, path.parent, follow_paths)
    return Saved(config, tensors, notes, remainder.read(source, notes, **hub))


def read(source: str | Path, *, allow_pickle: bool = False, **hub: Any) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by key, veneer's notes) from an adapter's weight file.

    Raises:
        CheckpointError: the file is missing, is a pickle, is broken, or holds values that are not finite.
    """
    path = find_weights(source, allow_pickle=allow_pickle, **hub)
    metadata: Mapping[str, str] = {}
    if path.name == PICKLE_NAME:
        stored = read_pickle(path)
    else:
        stored, metadata = read_tensors(path)
    _check_finite(stored, repr(str(path)))
    tensors = _under_current_names(stored, path)
    return computable(tensors), provenance.read(metadata, stored)


def read_notes(source: str | Path, **hub: Any) -> dict[str, Any]:
    """veneer's notes in an adapter's weight file, without its tensors; empty if it has none or cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(find_weights(source, **hub), framework="pt") as file:
            return provenance.read(file.metadata() or {})
    except (CheckpointError, SafetensorError, OSError):
        return {}


def renamed() -> dict[str, str]:
    """The current names of attributes that have other names in older files, by the old name."""
    names: dict[str, str] = {}
    for config in METHODS.values():
        names |= config.renamed
    return names


def _under_current_names(stored: Tensors, path: Path) -> Tensors:
    names = renamed()
    tensors = {}
    twice = []
    for key, tensor in stored.items():
        current = current_key(key, names)
        if current != key and current in stored:
            twice.append(key)
        tensors[current] = tensor
    if twice:
        raise CheckpointError(f"{str(path)!r} holds tensors under both an old and a new name:{listing(twice)}")
    return tensors


def current_key(key: str, names: Mapping[str, str]) -> str:
    """The current key for a key of an older file; `names` is the result of `renamed`."""
    path, dot, attribute = key.rpartition(".")
    return path + dot + names.get(attribute, attribute)


def _check_finite(tensors: Tensors, what: str) -> None:
    broken = not_finite(tensors)
    if broken:
        raise CheckpointError(f"{what} holds values that are not finite in:{listing(broken)}")


def not_finite(tensors: Tensors) -> list[str]:
    """The keys of the tensors with values that are not finite."""
    return [key for key, tensor in tensors.items() if tensor.is_floating_point() and not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    wide = tensor.float()
    if math.isfinite(wide.sum()):  # faster than `isfinite`: a finite sum has only finite terms
        return True
    return bool(torch.isfinite(wide if tensor.element_size() == 1 else tensor).all())


# Loading into an attached adapter


def fill(model: Any, state: State, name: str, saved: Saved, *, lift: bool = True, check_base: bool = True) -> None:
    """Load a saved adapter into the attached one called `name`. Everything is checked before anything changes.

    Args:
        lift: keep the adapter in float32 if the base is in half precision.
        check_base: raise an error if the adapter was trained on another base model.

    Raises:
        CheckpointError: a tensor is missing, unexpected, misshapen or damaged, or the base model is another one.
        ConfigError: the adapter was attached without values, and the model cannot be called with it.
    """
    is_new = any(parameter.is_meta for parameter in state.parameters(name))
    others = [other for other in state.configs if other != name]
    brought = embeddings.among(saved.tensors, model, slots(state, name), others)
    check_fit(model, state, name, saved.tensors, saved.notes, check_base, brought)
    remainder.check(state, name, saved.training)
    if brought:
        state.reshaped.append(embeddings.Brought(brought))
    absorb(state, name, saved.tensors, saved.training)
    settle(model, state, name, lift=lift)
    state.mark(name)
    if is_new:
        trial.check(model, state, name)


def _brought_weights(state: State, name: str, brought: Sequence[embeddings.Embedding]) -> dict[str, Tensor]:
    """The weights that a file brings for adapted embeddings, by path: the adapter was trained on these."""
    weights = {}
    for path in state.adapters(name):
        target = state.layers[path].target
        for module, weight in brought:
            if target.base is module:
                weights[path] = target.as_matrix(weight)
    return weights


def check_refill(state: State, name: str, config: Config) -> None:
    """Raise unless a saved adapter with this config can be loaded into the attached one called `name`.

    Raises:
        CheckpointError: the method differs, or settings that decide what the tensors mean.
        VeneerError: the attached adapter is merged.
    """
    present = state.configs[name].saved()
    if present.peft_type != config.peft_type:
        raise CheckpointError(
            f"adapter {name!r} is {present.peft_type}, but the file is {config.peft_type}; load it under another name"
        )
    if any(name in layer.merged_adapters for layer in state.layers.values()):
        raise VeneerError(f"{name!r} is merged into the weights; call unmerge_adapter() before loading into it")
    here = provenance.settings(present)
    differences = []
    for field, value in provenance.settings(config).items():
        if here.get(field) != value:
            differences.append(f"{field} = {here.get(field)!r}, but {value!r} in the file")
    if differences:
        raise CheckpointError(
            f"adapter {name!r} and the file have different settings; load it under another name:{listing(differences)}"
        )


def check_fit(
    model: Any,
    state: State,
    name: str,
    tensors: Tensors,
    notes: Mapping[str, Any],
    check_base: bool = True,
    brought: Sequence[embeddings.Embedding] = (),
) -> None:
    """Raise unless a file's tensors fit the adapter, are undamaged, and were trained on this base model."""
    check(state, name, tensors)
    provenance.check_undamaged(notes)
    if check_base:
        provenance.check_prepared(model, notes)
        weights = base_weights(model, state, name) | _brought_weights(state, name, brought)
        provenance.check_base(weights, notes, is_rounded(state, name))


def check(state: State, name: str, tensors: Tensors) -> None:
    """Raise CheckpointError unless `tensors` have the adapter's keys and shapes, and are floats where it has floats."""
    expected = slots(state, name)
    copies = {}
    for key, slot in repeats(state, name).items():
        if key in tensors and slot in tensors:
            copies[key] = slot
    problems = {
        "missing": [key for key in expected if key not in tensors],
        "unexpected": [],
        "of another shape": [],
        "of another type": [],
        "different from the tensors they must repeat": [],
    }
    for key, tensor in tensors.items():
        if key not in expected:
            if key not in copies and not embeddings.is_one(key):
                problems["unexpected"].append(key)
            continue
        wanted = expected[key]
        if tensor.shape != wanted.shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(wanted.shape)} in the model"
            problems["of another shape"].append(f"{key}: {shapes}")
        if tensor.is_floating_point() != wanted.is_floating_point():
            problems["of another type"].append(f"{key}: {tensor.dtype} in the file")
    for key, slot in copies.items():
        if not _is_repeated(tensors[key], tensors[slot]):
            problems["different from the tensors they must repeat"].append(key)
    lines = [f"{len(keys)} {problem}:{listing(keys)}" for problem, keys in problems.items() if keys]
    if lines:
        raise CheckpointError(f"the file's tensors do not fit adapter {name!r} on this model: " + "\nand ".join(lines))


def _is_repeated(tensor: Tensor, first: Tensor) -> bool:
    """Whether two tensors hold the same values; a tied module may hold them transposed."""
    return torch.equal(tensor, first) or (first.dim() == 2 and torch.equal(tensor, first.T))


def absorb(state: State, name: str, tensors: Tensors, training: Mapping[str, Tensor] | None = None) -> None:
    """Load checked tensors into the adapter: in place, except for placeholder tensors.

    Args:
        training: the tensors of `remainder`, without which some methods cannot be trained on.
    """
    given = {**(training or {}), **tensors}
    for prefix, part in parts(state, name):
        values = {}
        for key in (*export(part), *remainder.of_part(part)):
            if prefix + key in given:
                values[key] = given[prefix + key]
        if hasattr(part, "absorb"):
            part.absorb(values)
        else:
            is_placeholder = any(tensor.is_meta for tensor in part.state_dict().values())
            part.load_state_dict(values, strict=False, assign=is_placeholder)
    remainder.absorb_schedule(state, name, given)


# The base model


def is_rounded(state: State, name: str) -> bool:
    """Whether a target of the adapter is quantised, so that its weights only approximate the pretrained ones."""
    return any(state.layers[path].target.is_quantised for path in state.adapters(name))


def base_weights(model: Any, state: State, name: str) -> dict[str, Tensor]:
    """The pretrained weights of an adapter's targets by path; for a prompt, the input embedding under the path "".

    Weights that are not fully in memory are left out.
    """
    weights = {}
    for path, adapter in state.adapters(name).items():
        if not isinstance(adapter, Replace):
            weights[path] = _pretrained(state, path)
    if name in state.prompts:
        weights[""] = model.get_input_embeddings().weight
    whole = {}
    for path, W in weights.items():
        if W is not None and not W.is_meta and not hasattr(W, "full_tensor"):
            whole[path] = W
    return whole


def _pretrained(state: State, path: str) -> Tensor | None:
    """The pretrained weight of a layer; for a block, which has none, that of the first linear layer inside."""
    target = state.layers[path].target
    if target.kind != "block":
        return target.original_weight() if target.is_readable else None
    for below, module in walk(target.base, path):
        if kind_of(module).kind == "linear" and quantised(module) is None:
            return state.layers[below].target.original_weight() if below in state.layers else module.weight
    return None
