"""Saved adapters that name modules which a model lacks.

Other programs write one list of names for all architectures ("q_proj", "gate_proj", ...). When such a file is loaded,
its tensors decide: a name without a module and without tensors adapts nothing, and is passed over with a warning.
Tensors for modules that the model lacks are passed over only if the caller allows it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from ..errors import CheckpointError, TargetError, listing, nearest, warn
from ..files.read import PREFIX
from ..targets.walk import walk
from . import checkpoint
from .adapter import Tensors
from .checkpoint import Saved
from .config import TASK_HEADS, Config, LayerConfig
from .select import any_matches, pattern_matches, targeted
from .state import State


def fitted(model: nn.Module, saved: Saved, allow_absent: bool = False) -> Saved:
    """A saved adapter whose config names only what there is on a model.

    Args:
        allow_absent: also pass over names for which the file has tensors; `without_absent` then drops the tensors.
    """
    config = copy.copy(saved.config)
    tensors = {} if allow_absent else saved.tensors
    paths = [path for path, _ in walk(model) if path]
    _check_no_tensors(model, config, paths, tensors)
    passed_over = _drop_names(config, "modules_to_save", paths)
    if isinstance(config, LayerConfig):
        passed_over += _drop_names(config, "exclude_modules", paths)
        passed_over += _drop_targets(model, config, paths, tensors)
    if not passed_over:
        return saved
    warn(f"the adapter's config names what {type(model).__name__} lacks, which is passed over:{listing(passed_over)}")
    return saved._replace(config=config)


def without_absent(model: nn.Module, state: State, name: str, saved: Saved) -> Saved:
    """A saved adapter without the tensors for modules that a model lacks.

    The adapter `name` is attached already: its own keys show how a key ends behind the path of a module.
    """
    paths = {path for path, _ in walk(model)}
    expected = checkpoint.slots(state, name)
    endings = set()
    for key in expected:
        path = _path_in(key, paths)
        endings.add(key.removeprefix(f"{PREFIX}{path}"))
    kept = {}
    dropped = []
    for key, tensor in saved.tensors.items():
        ending = next((ending for ending in endings if key.endswith(ending)), None)
        if ending is None or key in expected or key.removeprefix(PREFIX).removesuffix(ending) in paths:
            kept[key] = tensor
        else:
            dropped.append(key)
    if dropped:
        warn(
            f"{len(dropped)} of the file's {len(saved.tensors)} tensors are for modules that {type(model).__name__} "
            f"lacks, and are passed over:{listing(dropped)}"
        )
    return saved._replace(tensors=kept)


def _check_no_tensors(model: nn.Module, config: Config, paths: Collection[str], tensors: Tensors) -> None:
    """Raise if the config names a module that the model lacks and for which the file has tensors."""
    for field in ("target_modules", "modules_to_save"):
        names = getattr(config, field, None)
        for name in names if isinstance(names, list) else ():
            if _has_tensors(name, tensors) and not any_matches(paths, name):
                raise CheckpointError(
                    f"{field}: {type(model).__name__} has no module {name!r}{nearest(name, paths)}, for which the file "
                    "has tensors. Load it onto its own base model, or pass over the tensors with allow_absent=True "
                    "(--allow-absent)"
                )


def _path_in(key: str, paths: set[str]) -> str:
    """The longest path of a module that a key begins with."""
    parts = key.removeprefix(PREFIX).split(".")
    for length in range(len(parts), 0, -1):
        path = ".".join(parts[:length])
        if path in paths:
            return path
    return ""


def _drop_names(config: Config, field: str, paths: Collection[str]) -> list[str]:
    """Drop the names of a field that match no module; return what was dropped."""
    names = getattr(config, field)
    if not isinstance(names, list):
        return []
    heads = TASK_HEADS.get(config.task_type, ())  # type: ignore[call-overload]
    kept = []
    for name in names:
        if name in heads or any_matches(paths, name):
            kept.append(name)
    setattr(config, field, kept or None)
    return _dropped(field, names, kept)


def _dropped(field: str, names: Iterable[str], kept: Collection[str]) -> list[str]:
    """A line for each name that was not kept."""
    return [f"{field}: {name!r}" for name in names if name not in kept]


def _has_tensors(name: str, tensors: Tensors) -> bool:
    return any(f".{name}." in f".{key}" for key in tensors)


def _drop_targets(model: nn.Module, config: LayerConfig, paths: Collection[str], tensors: Tensors) -> list[str]:
    """Drop the names of `target_modules` that adapt nothing, and the keys of patterns that match no target."""
    names = config.target_modules
    if not isinstance(names, list) or not names:
        return []
    present = [name for name in names if any_matches(paths, name)]
    config.target_modules = present
    if not present:
        raise TargetError(f"target_modules = {names!r}: {type(model).__name__} has no module of these names")
    try:
        chosen = targeted(model, config)
    except TargetError:  # attaching explains it
        return _dropped("target_modules", names, present)
    kept = []
    for name in present:
        if any_matches(chosen, name) or _has_tensors(name, tensors):
            kept.append(name)
    config.target_modules = kept
    passed_over = _dropped("target_modules", names, kept)
    adapted = list(chosen)
    if config.bare_parameters():
        for path, module in walk(model):
            adapted += [f"{path}.{name}" for name in module._parameters]
    for field in config.patterns:
        passed_over += _drop_patterns(config, field, adapted)
    return passed_over


def _drop_patterns(config: Any, field: str, chosen: Iterable[str]) -> list[str]:
    """Drop the keys of a field like `rank_pattern` that match none of the targets; return what was dropped."""
    patterns = getattr(config, field)
    if not patterns:
        return []
    kept = {}
    for key, value in patterns.items():
        if pattern_matches(key, chosen, field):
            kept[key] = value
    setattr(config, field, kept)
    return _dropped(field, patterns, kept)
