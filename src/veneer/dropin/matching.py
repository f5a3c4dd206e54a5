"""Match a config's targets to modules by PEFT's rules: entries without a match are ignored, with PEFT's warnings."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..errors import ConfigError, TargetError
from ..targets.target import adapts
from ..targets.walk import bare, matches, walk
from .configs import Names
from .strict import is_strict
from .tables import methods as table
from .tables.targets import default

FIELDS = ("target_modules", "feedforward_modules")
"""Fields with names of targets, which have defaults."""
WRITTEN: dict[tuple[Any, str], dict[Any, Any]] = {}
"""Entries that other libraries add to PEFT's mappings of default targets, by method and field."""
HOLDERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """The first key of a `rank_pattern` that matches a module, or the module's own name without one."""
    return next((pattern for pattern in pattern_keys if _fits_end(pattern, key_to_match)), key_to_match)


def _fits_end(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def is_excluded(config: Any, key: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` keep adapters off the module called `key`."""
    exclude = getattr(config, "exclude_modules", None) or ()
    if isinstance(exclude, str) and re.fullmatch(exclude, key):
        return True
    if not isinstance(exclude, str) and _matches_any(key, exclude):
        return True
    saved = getattr(config, "modules_to_save", None) or ()
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", key) for entry in saved)


def check_target_module_exists(config: Any, key: str) -> Any:
    """Whether a config targets the module called `key`; false if the module is excluded."""
    targets = config.target_modules
    if is_excluded(config, key) or targets is None:
        return False
    if isinstance(targets, str):
        return match_target_against_key(targets, key)
    if key in targets:
        return True
    if not _matches_any(key, targets):
        return False
    layers = getattr(config, "layers_to_transform", None)
    if layers is None or layers == []:
        return True
    number = _layer_number(key, getattr(config, "layers_pattern", None))
    numbers = [layers] if isinstance(layers, int) else layers
    return number is not None and number in numbers


def _layer_number(key: str, layers_pattern: Any) -> int | None:
    names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    if not names:
        return _number_by(r".*?\.[^.]*\.(\d+)\.", key)
    for name in names:
        number = _number_by(rf"(?:^|.*?\.){name}\.(\d+)\.", key)
        if number is not None:
            return number
    return None


def _number_by(pattern: str, key: str) -> int | None:
    match = re.match(pattern, key)
    return None if match is None else int(match.group(1))


def _paths(model: nn.Module) -> list[str]:
    """Paths of all modules except the root."""
    return [path for path, _ in walk(model) if path]


def _matches_any(path: str, entries: Iterable[str]) -> bool:
    return any(matches(path, entry) for entry in entries)


def _matched(paths: Sequence[str], entries: Sequence[str]) -> list[str]:
    """The paths that an entry matches."""
    return [path for path in paths if _matches_any(path, entries)]


def _used(entries: Iterable[str], paths: Sequence[str]) -> list[str]:
    """The entries that match a path."""
    return [entry for entry in entries if _matched(paths, [entry])]


def narrowed(model: nn.Module, config: Any) -> Any:
    """A copy of a config without the entries that match nothing in `model`, since the core refuses these.

    Raises:
        TargetError: no target is left; in PEFT's words.
    """
    config = copy.copy(config)
    for field in FIELDS:
        names = getattr(config, field, None)
        if isinstance(names, set):
            setattr(config, field, sorted(names))
    if is_strict():
        return config
    paths = _paths(model)
    saved = _narrow_copies(model, config, paths)
    _narrow_tokens(model, config, paths, saved)
    if not hasattr(config, "target_modules") or getattr(config, "members", None) is None:
        return config
    if config.target_modules is not None or not getattr(config, "target_parameters", None):
        fill_defaults(model, config)
        _note_filled(config)
    if config.target_modules == "all-linear":
        _narrow_patterns(config, paths)
        return config
    targets = [path for path in paths if check_target_module_exists(config, path)]
    _warn_of_ties(model, config, [*saved, *targets])
    if getattr(config, "ensure_weight_tying", False):
        targets = _without_followers(model, targets)
    parameters = _narrow_parameters(model, config)
    _check_kinds(model, config, targets)
    if not targets and not parameters:
        raise TargetError(_nothing_found(config, paths))
    _warn_unused(config, paths, targets)
    if config.target_modules is not None:
        _narrow_targets(config, targets)
    _narrow_patterns(config, [*targets, *parameters])
    return config


def _note_filled(config: Any) -> None:
    """Record the targets before they become full paths; they are later written into the caller's config."""
    filled = {}
    for field in FIELDS:
        if hasattr(config, field):
            filled[field] = getattr(config, field)
    config.__dict__["filled"] = filled


def _narrow_copies(model: nn.Module, config: Any, paths: Sequence[str]) -> list[str]:
    """Narrow `modules_to_save`; return the paths of the modules that are trained as copies.

    Raises:
        TypeError: one of these is a container of modules.
    """
    if getattr(config, "modules_to_save", None):
        entries = dict.fromkeys(config.modules_to_save)
        config.modules_to_save = _used(entries, paths) or None
    saved = _matched(paths, getattr(config, "modules_to_save", None) or ())
    modules = dict(walk(model))
    for path in saved:
        module = bare(modules[path])
        if isinstance(module, HOLDERS):
            raise TypeError(f"modules_to_save cannot be applied to modules of type {type(module)}")
    if getattr(config, "ensure_weight_tying", False) and saved:
        first = _without_followers(model, saved)
        if len(first) < len(saved):
            config.modules_to_save = first
    return saved


def _without_followers(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The first of each set of modules with tied weights: with `ensure_weight_tying` the others follow it."""
    modules = dict(walk(model))
    first: dict[int, str] = {}
    for path in paths:
        weight = getattr(bare(modules[path]), "weight", None)
        identity = id(path) if weight is None else id(weight)
        first.setdefault(identity, path)
    return list(first.values())


def _narrow_tokens(model: nn.Module, config: Any, paths: Sequence[str], saved: Sequence[str]) -> None:
    """Narrow `trainable_token_indices` to the first of tied modules; the others train the same tokens with it.

    Raises:
        TargetError: a name matches no module, or one that is trained as a copy.
        ConfigError: tying is required, but the tokens of tied modules differ.
    """
    indices = getattr(config, "trainable_token_indices", None)
    must_tie = bool(indices) and getattr(config, "ensure_weight_tying", False)
    if must_tie and not tied_modules(model):
        warnings.warn(
            "ensure_weight_tying=True but the model does not have tied weights (tie_word_embeddings=False). Weight "
            "tying will not be applied for trainable_token_indices.",
            stacklevel=5,
        )
    if not isinstance(indices, dict):
        return
    by_path = _tokens_by_path(indices, paths)
    if set(by_path) & set(saved):
        raise TargetError(
            "The embedding layer is already marked to be trained fully, either specify "
            '`modules_to_save=[..., "embed_tokens", ...]` or `trainable_token_indices={...}` but not both.'
        )
    first = {path: by_path[path] for path in _without_followers(model, list(by_path))}
    followers = set(by_path) - set(first)
    differ = any(by_path[path] not in first.values() for path in followers)
    if differ and must_tie:
        raise ConfigError(
            "Cannot ensure weight tying when different token indices are specified for tied layers. Conflicting "
            f"layers: {by_path}. Please use the same indices for all tied layers or set ensure_weight_tying=False."
        )
    if followers and not differ:
        config.trainable_token_indices = first


def _tokens_by_path(indices: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    by_path: dict[str, Any] = {}
    missing = set()
    for name, tokens in indices.items():
        matched = _matched(paths, [name])
        by_path |= dict.fromkeys(matched, tokens)
        if not matched:
            missing.add(name)
    if missing:
        raise TargetError(f"Target modules {missing} not found in the base model.")
    return by_path


TIED = "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but "
RISK = (
    "This can lead to complications, for example when merging the adapter or converting your model to formats other "
    "than safetensors. Check the discussion here: https://github.com/huggingface/peft/issues/2777"
)


def _warn_of_ties(model: nn.Module, config: Any, paths: Sequence[str]) -> None:
    """Warn, as PEFT does, of an adapter on a module with tied weights, or of requested tying without tied modules."""
    modules = dict(walk(model))
    weight, _ = _embedding(model)
    is_tied = bool(tied_modules(model))
    requested = getattr(config, "ensure_weight_tying", None)
    touched = is_tied and any(getattr(bare(modules[path]), "weight", None) is weight for path in paths)
    if requested and not is_tied:
        message = "You have requested `ensure_weight_tying`, but no tied modules were found in the model"
    elif requested and not touched:
        message = (
            "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or "
            "`target_modules`"
        )
    elif touched and requested is None:
        message = f"{TIED}no implementation exists to tie the adapters. {RISK}"
    elif touched and not requested:
        message = f"{TIED}`ensure_weight_tying` is not set to True. {RISK}"
    else:
        return
    warnings.warn(message, stacklevel=6)


def tied_modules(model: Any) -> list[str]:
    """Paths of the modules tied to the input embedding; none if the model's config rules tying out."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    model = model.model if hasattr(model, "tuner_layer_cls") else model
    weight, embedding = _embedding(model)
    config = getattr(model, "config", None)
    if weight is None or not getattr(config, "tie_word_embeddings", True):
        return []
    tied = []
    for path, wrapped in walk(model):
        module = bare(wrapped)
        if module is not embedding and getattr(module, "weight", None) is weight:
            tied.append(path)
    return sorted(tied)


def _embedding(model: Any) -> tuple[Any, Any]:
    """(weight, module) of the input embedding, or (None, None)."""
    try:
        embedding = bare(model.get_input_embeddings())
    except (AttributeError, NotImplementedError):
        return None, None
    return getattr(embedding, "weight", None), embedding


def fill_defaults(model: Any, config: Any) -> None:
    """Fill in target fields that are None: from the model's type, or else from the roles of its modules.

    Raises:
        TargetError: there is no default for this model.
    """
    model_type = _type_of(model)
    defaults = {}
    for field in FIELDS:
        if getattr(config, field, ()) is None:
            defaults[field] = _default_for(config, field, model_type)
    by_role = copy.copy(config)
    by_role.target_modules = None
    if None in defaults.values():
        try:
            by_role.fill_targets(model)
        except TargetError:
            if table.METHODS[config.peft_type.value].takes_any:
                config.target_modules = "all-linear"
                return
            raise TargetError(_no_default(config)) from None
    for field, value in defaults.items():
        if value is None:
            value = getattr(by_role, field)
        setattr(config, field, value)


def _type_of(model: Any) -> str | None:
    """The model's type, which a config of another library may have only in its dict."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if isinstance(model_type, str) or not hasattr(config, "to_dict"):
        return model_type
    return config.to_dict().get("model_type")  # type: ignore[union-attr]


def _default_for(config: Any, field: str, model_type: Any) -> Any:
    """The default that another library has added for a type of model, or else PEFT's."""
    added = WRITTEN.get((config.peft_type, field), {}).get(model_type)
    return added if added is not None else default(config.peft_type.value, field, model_type)


def _no_default(config: Any) -> str:
    fields = [f"`{field}`" for field in (*FIELDS, "target_parameters") if hasattr(config, field)]
    message = f"Please specify {' or '.join(fields)} in `peft_config`"
    return message.replace("`target_parameters` in", "`target_parameters`in")  # as in PEFT


def _check_kinds(model: nn.Module, config: Any, targets: Sequence[str]) -> None:
    """Raise TargetError unless the method supports the kind of every targeted module."""
    modules = dict(walk(model))
    kinds = config.adapter.kinds
    for path in targets:
        if not adapts(kinds, modules[path]):
            raise TargetError(
                f"Target module {modules[path]} is not supported. Currently, only the following modules are "
                f"supported: {', '.join(sorted(kinds))}."
            )


def _narrow_parameters(model: nn.Module, config: Any) -> list[str]:
    """Narrow `target_parameters`; return the names of the parameters that they match."""
    entries = getattr(config, "target_parameters", None)
    if not entries:
        return []
    names = []
    for path, module in walk(model):
        names += [f"{path}.{name}" for name in module._parameters]
    parameters = _matched(names, entries)
    config.target_parameters = _used(entries, parameters) or None
    if not parameters and config.target_modules:
        warnings.warn(
            f"target_parameters={list(entries)} were set but no parameter was matched.", RuntimeWarning, stacklevel=5
        )
    return parameters


def _nothing_found(config: Any, paths: Sequence[str]) -> str:
    """PEFT's message for a config without any target in the model."""
    excluded = [path for path in paths if is_excluded(config, path)]
    if excluded and len(excluded) == len(paths):
        return (
            "All modules were excluded. This is likely unintended. "
            "Check your `target_modules`, `exclude_modules` and `modules_to_save` configuration."
        )
    if not config.target_modules:
        return (
            "No `target_modules` passed but also no `target_parameters` found. Please check the values for these "
            "arguments."
        )
    if not excluded:
        message = (
            f"Target modules {_as_shown(config.target_modules)} not found in the base model. Please check the target "
            "modules and try again."
        )
    else:
        message = (
            "No modules were targeted for adaptation. This might be caused by a combination of mismatched target "
            "modules and excluded modules. Please check your `target_modules` and `exclude_modules` configuration. You "
            "may also have only targeted modules that are marked to be saved (`modules_to_save`)."
        )
    if getattr(config, "layers_to_transform", None) is not None:
        message += f" Note: You specified 'layers_to_transform': {config.layers_to_transform}."
    if getattr(config, "layers_pattern", None) is not None:
        message += f" You also specified 'layers_pattern': {config.layers_pattern}."
    return message


def _as_shown(names: Any) -> Any:
    """Names as they appear in PEFT's messages: a list as a set, a regular expression as it is."""
    return names if names is None or isinstance(names, str) else set(names)


def _warn_unused(config: Any, paths: Sequence[str], targets: Sequence[str]) -> None:
    exclude = _as_shown(getattr(config, "exclude_modules", None))
    if exclude and not any(is_excluded(config, path) for path in paths):
        warnings.warn(
            f"You have passed exclude_modules={exclude} but no modules were excluded. "
            "Please check that exclude_modules was set correctly.",
            stacklevel=4,
        )
    if config.target_modules and not targets:
        names = _as_shown(config.target_modules)
        warnings.warn(f"target_modules={names} were set but no module was matched.", RuntimeWarning, stacklevel=4)


def shortened(model: nn.Module, config: Any) -> Any:
    """The targets; many full paths become the fewest endings that match the same modules, which is faster to match."""
    targets = getattr(config, "target_modules", None)
    least = table.CONSTANTS["MIN_TARGET_MODULES_FOR_OPTIMIZATION"]
    if not isinstance(targets, (list, tuple, set)) or len(targets) < least or config.subsets:  # type: ignore[operator]
        return targets
    others = [path for path in _paths(model) if not check_target_module_exists(config, path)]
    endings = find_minimal_target_modules(targets, others)
    return Names(endings) if 0 < len(endings) < len(targets) else targets


def _narrow_targets(config: Any, targets: Sequence[str]) -> None:
    """Replace the targets by full paths, so that the core does not apply its own matching rules."""
    config.__dict__["written"] = config.target_modules
    config.target_modules = list(targets)
    config.exclude_modules = None
    config.layers_to_transform = None
    config.layers_pattern = None
    for field in config.subsets:
        entries = getattr(config, field)
        if isinstance(entries, (list, tuple, set)):
            setattr(config, field, _used(entries, targets))


def _narrow_patterns(config: Any, targets: Sequence[str]) -> None:
    for field in config.patterns:
        patterns = getattr(config, field, None) or {}
        used = {}
        unused = []
        for pattern, value in patterns.items():
            if any(_fits_end(pattern, path) for path in targets):
                used[pattern] = value
            else:
                unused.append(pattern)
        if unused and field in ("rank_pattern", "alpha_pattern"):
            warnings.warn(
                f"The following {field} keys did not match any targeted module and were ignored: {sorted(unused)}.",
                RuntimeWarning,
                stacklevel=4,
            )
        if unused:
            setattr(config, field, used)


def has_adapters(model: nn.Module) -> bool:
    return any(bare(module) is not module for module in model.modules())


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """The modules that a config matches and those that it does not."""
    config = tuner.peft_config[adapter_name]
    matched = []
    unmatched = []
    for path in _paths(tuner.model):
        if check_target_module_exists(config, path):
            matched.append(path)
        else:
            unmatched.append(path)
    return {"matched": matched, "unmatched": unmatched}


def find_minimal_target_modules(target_modules: Iterable[str], other_module_names: Iterable[str]) -> set[str]:
    """The fewest endings of names that match all of the targets and none of the other modules.

    Raises:
        ValueError: the targets are no list or set of names, a name is empty, or a target is also another module.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError("target_modules should be a list or set of strings.")
    targets = set(target_modules)
    others = set(other_module_names)
    if "" in targets:
        raise ValueError("target_modules should not contain an empty string.")
    if targets & others:
        raise ValueError(
            "target_modules and other_module_names contain common elements, this should not happen, please open a "
            "GitHub issue at https://github.com/huggingface/peft/issues with the code to reproduce this issue: "
            f"{sorted(targets & others)}"
        )
    endings: set[str] = set()
    for path in sorted(targets):
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            ending = ".".join(parts[-length:])
            if not any(matches(other, ending) for other in others):
                endings.add(ending)
                break
    return {ending for ending in endings if not _matches_any(ending, endings - {ending})}
