"""Which modules a config means, by PEFT's rules: what matches nothing is passed over, with its warnings and errors."""

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

EXCLUDED = "excluded"


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """The first key of a `rank_pattern` that means a module; the module's own name without one."""
    return next((k for k in pattern_keys if re.match(rf"(.*\.)?({k})$", key_to_match)), key_to_match)


def is_excluded(config: Any, key: str) -> bool:
    exclude, saved = getattr(config, "exclude_modules", None), getattr(config, "modules_to_save", None) or ()
    if isinstance(exclude, str) and re.fullmatch(exclude, key):
        return True
    if not isinstance(exclude, str) and any(matches(key, entry) for entry in exclude or ()):
        return True
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", key) for entry in saved)


def check_target_module_exists(config: Any, key: str) -> Any:
    """Whether a config's targeting fields mean the module called `key`; false for one that is excluded."""
    targets = config.target_modules
    if is_excluded(config, key) or targets is None:
        return False
    if isinstance(targets, str):
        return match_target_against_key(targets, key)
    if key in targets:
        return True
    if not any(key.endswith(f".{entry}") for entry in targets):
        return False
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or wanted == []:
        return True
    number = _layer_number(key, getattr(config, "layers_pattern", None))
    return number is not None and number in ([wanted] if isinstance(wanted, int) else wanted)


def _layer_number(key: str, patterns: Any) -> int | None:
    names = [patterns] if isinstance(patterns, str) else patterns
    for name in names or [r"[^.]*"]:
        found = re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", key) if names else re.match(r".*?\.[^.]*\.(\d+)\.", key)
        if found:
            return int(found.group(1))
    return None


def narrowed(model: nn.Module, config: Any) -> Any:
    """A copy of a config without the entries that match nothing in `model`, for a core that refuses them.

    Raises:
        TargetError: nothing is left; in PEFT's words.
    """
    config = copy.copy(config)
    for name in FIELDS:
        if isinstance(getattr(config, name, None), set):
            setattr(config, name, sorted(getattr(config, name)))
    if is_strict():
        return config
    paths = [path for path, _ in walk(model) if path]
    _narrow_copies(config, paths)
    saved = [p for p in paths if any(matches(p, n) for n in getattr(config, "modules_to_save", None) or ())]
    _check_copies(dict(walk(model)), saved)
    if getattr(config, "ensure_weight_tying", False) and saved:
        first = _without_followers(model, saved)
        config.modules_to_save = first if len(first) < len(saved) else config.modules_to_save
    _narrow_tokens(model, config, paths, saved)
    if not hasattr(config, "target_modules") or getattr(config, "members", None) is None:
        return config
    if config.target_modules is not None or not getattr(config, "target_parameters", None):
        fill_defaults(model, config)
        config.__dict__["filled"] = {field: getattr(config, field) for field in FIELDS if hasattr(config, field)}
    if config.target_modules == "all-linear":
        _narrow_patterns(config, paths)
        return config
    found = [path for path in paths if check_target_module_exists(config, path)]
    _warn_of_ties(model, config, [*saved, *found])
    found = _without_followers(model, found) if getattr(config, "ensure_weight_tying", False) else found
    bare_parameters = _narrow_parameters(model, config)
    _check_kinds(model, config, found)
    if not found and not bare_parameters:
        raise TargetError(_nothing_found(config, paths))
    _warn_unused(config, paths, found)
    if config.target_modules is not None:
        _narrow_targets(config, found)
    _narrow_patterns(config, [*found, *bare_parameters])
    return config


def _without_followers(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Of modules that share one weight the first: with `ensure_weight_tying` the others follow what is put on it."""
    modules = dict(walk(model))
    weights = {path: getattr(bare(modules[path]), "weight", None) for path in paths}
    seen: dict[int, str] = {}
    for path, weight in weights.items():
        seen.setdefault(id(path if weight is None else weight), path)
    return list(seen.values())


HOLDERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _check_copies(modules: dict[str, nn.Module], saved: Sequence[str]) -> None:
    for path in saved:
        if isinstance(bare(modules[path]), HOLDERS):
            raise TypeError(f"modules_to_save cannot be applied to modules of type {type(bare(modules[path]))}")


def _narrow_tokens(model: nn.Module, config: Any, paths: Sequence[str], saved: Sequence[str]) -> None:
    """Of modules that share one weight the first: the others learn the same tokens with it.

    Raises:
        TargetError: a name means no module, or one that is trained whole.
        ConfigError: the tokens of tied modules differ, though they should be tied.
    """
    wanted = getattr(config, "trainable_token_indices", None)
    is_tied_on_request = bool(wanted) and getattr(config, "ensure_weight_tying", False)
    if is_tied_on_request and not tied_modules(model):
        warnings.warn(
            "ensure_weight_tying=True but the model does not have tied weights (tie_word_embeddings=False). Weight "
            "tying will not be applied for trainable_token_indices.",
            stacklevel=5,
        )
    if not isinstance(wanted, dict):
        return
    found = {path: tokens for name, tokens in wanted.items() for path in paths if matches(path, name)}
    missing = {name for name in wanted if not any(matches(path, name) for path in paths)}
    if missing:
        raise TargetError(f"Target modules {missing} not found in the base model.")
    if set(found) & set(saved):
        raise TargetError(
            "The embedding layer is already marked to be trained fully, either specify "
            '`modules_to_save=[..., "embed_tokens", ...]` or `trainable_token_indices={...}` but not both.'
        )
    first = {path: tokens for path, tokens in found.items() if path in _without_followers(model, list(found))}
    followers = {path: tokens for path, tokens in found.items() if path not in first}
    differ = [path for path, tokens in followers.items() if tokens not in first.values()]
    if differ and is_tied_on_request:
        raise ConfigError(
            "Cannot ensure weight tying when different token indices are specified for tied layers. Conflicting "
            f"layers: {found}. Please use the same indices for all tied layers or set ensure_weight_tying=False."
        )
    if followers and not differ:
        config.trainable_token_indices = first


TIED = "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but "
RISK = (
    "This can lead to complications, for example when merging the adapter or converting your model to formats other "
    "than safetensors. Check the discussion here: https://github.com/huggingface/peft/issues/2777"
)


def _warn_of_ties(model: nn.Module, config: Any, paths: Sequence[str]) -> None:
    """What PEFT says where an adapter is put on a module that shares its weight, or should have been."""
    modules, followers = dict(walk(model)), tied_modules(model)
    asked = getattr(config, "ensure_weight_tying", None)
    weight, _ = _embedding(model)
    touched = bool(followers) and any(getattr(bare(modules[p]), "weight", None) is weight for p in paths)
    if asked and not followers:
        words = "You have requested `ensure_weight_tying`, but no tied modules were found in the model"
    elif asked and not touched:
        words = (
            "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or "
            "`target_modules`"
        )
    elif touched and asked is None:
        words = f"{TIED}no implementation exists to tie the adapters. {RISK}"
    elif touched and not asked:
        words = f"{TIED}`ensure_weight_tying` is not set to True. {RISK}"
    else:
        return
    warnings.warn(words, stacklevel=6)


def tied_modules(model: Any) -> list[str]:
    """Paths of the modules that share the input embedding's weight; none where the config says they are not tied."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    model = model.model if hasattr(model, "tuner_layer_cls") else model
    weight, embedding = _embedding(model)
    if weight is None or not getattr(getattr(model, "config", None), "tie_word_embeddings", True):
        return []
    same = {p: m for p, m in walk(model) if bare(m) is not embedding and getattr(bare(m), "weight", None) is weight}
    return sorted(same)


def _embedding(model: Any) -> tuple[Any, Any]:
    """(weight, module) of the input embedding; None where there is none."""
    try:
        embedding = bare(model.get_input_embeddings())
    except (AttributeError, NotImplementedError):
        return None, None
    return getattr(embedding, "weight", None), embedding


def _narrow_copies(config: Any, paths: Sequence[str]) -> None:
    saved = getattr(config, "modules_to_save", None)
    if saved:
        kept = [n for n in dict.fromkeys(saved) if any(matches(path, n) for path in paths)]
        config.modules_to_save = kept or None


FIELDS = ("target_modules", "feedforward_modules")


def fill_defaults(model: Any, config: Any) -> None:
    """Choose the fields of targets that are None: as a program wrote it for the model's type, as PEFT, or by role.

    Raises:
        TargetError: nothing says what to adapt.
    """
    kind, model_type = config.peft_type, getattr(getattr(model, "config", None), "model_type", None)
    missing = [field for field in FIELDS if getattr(config, field, ()) is None]
    found = {field: WRITTEN.get((kind, field), {}).get(model_type) for field in missing}
    found = {f: v if v is not None else default(kind.value, f, model_type) for f, v in found.items()}
    by_role = copy.copy(config)
    by_role.target_modules = None
    if any(value is None for value in found.values()):
        try:
            by_role.fill_targets(model)
        except TargetError:
            if table.METHODS[kind.value].takes_any:
                config.target_modules = "all-linear"
                return
            fields = " or ".join(f"`{field}`" for field in (*FIELDS, "target_parameters") if hasattr(config, field))
            raise TargetError(f"Please specify {fields} in `peft_config`".replace("meters` in", "meters`in")) from None
    for field, value in found.items():
        setattr(config, field, getattr(by_role, field) if value is None else value)


WRITTEN: dict[tuple[Any, str], dict[Any, Any]] = {}
"""What programs write into PEFT's mappings of default targets, by method and field."""


def _check_kinds(model: nn.Module, config: Any, found: Sequence[str]) -> None:
    modules, kinds = dict(walk(model)), config.adapter.kinds
    wrong = next((modules[path] for path in found if not adapts(kinds, modules[path])), None)
    if wrong is not None:
        raise TargetError(
            f"Target module {wrong} is not supported. Currently, only the following modules are supported: "
            f"{', '.join(sorted(kinds))}."
        )


def _narrow_parameters(model: nn.Module, config: Any) -> list[str]:
    wanted = getattr(config, "target_parameters", None)
    if not wanted:
        return []
    names = [f"{path}.{name}" for path, module in walk(model) for name in module._parameters]
    found = [name for name in names if any(matches(name, entry) for entry in wanted)]
    config.target_parameters = [entry for entry in wanted if any(matches(name, entry) for name in found)] or None
    if not found and config.target_modules:
        warnings.warn(
            f"target_parameters={list(wanted)} were set but no parameter was matched.", RuntimeWarning, stacklevel=5
        )
    return found


def _nothing_found(config: Any, paths: Sequence[str]) -> str:
    excluded = [path for path in paths if is_excluded(config, path)]
    unmatched = [path for path in paths if path not in set(excluded)]
    numbers = ""
    if getattr(config, "layers_to_transform", None) is not None:
        numbers += f" Note: You specified 'layers_to_transform': {config.layers_to_transform}."
    if getattr(config, "layers_pattern", None) is not None:
        numbers += f" You also specified 'layers_pattern': {config.layers_pattern}."
    if excluded and not unmatched:
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
        targets = config.target_modules if isinstance(config.target_modules, str) else set(config.target_modules)
        return (
            f"Target modules {targets} not found in the base model. Please check the target modules and try again."
            + numbers
        )
    return (
        "No modules were targeted for adaptation. This might be caused by a combination of mismatched target modules "
        "and excluded modules. Please check your `target_modules` and `exclude_modules` configuration. You may also "
        "have only targeted modules that are marked to be saved (`modules_to_save`)." + numbers
    )


def _warn_unused(config: Any, paths: Sequence[str], found: Sequence[str]) -> None:
    exclude = getattr(config, "exclude_modules", None)
    exclude = exclude if exclude is None or isinstance(exclude, str) else set(exclude)
    if exclude and not any(is_excluded(config, path) for path in paths):
        warnings.warn(
            f"You have passed exclude_modules={exclude} but no modules were excluded. "
            "Please check that exclude_modules was set correctly.",
            stacklevel=4,
        )
    if config.target_modules and not found:
        targets = config.target_modules if isinstance(config.target_modules, str) else set(config.target_modules)
        warnings.warn(f"target_modules={targets} were set but no module was matched.", RuntimeWarning, stacklevel=4)


def shortened(model: nn.Module, config: Any) -> Any:
    """The targets; many full paths as the fewest endings that mean the same, since each module is compared with all."""

    targets, least = getattr(config, "target_modules", None), table.CONSTANTS["MIN_TARGET_MODULES_FOR_OPTIMIZATION"]
    if not isinstance(targets, (list, tuple, set)) or len(targets) < least or config.subsets:  # type: ignore[operator]
        return targets
    others = [path for path, _ in walk(model) if path and not check_target_module_exists(config, path)]
    short = find_minimal_target_modules(targets, others)
    return Names(short) if 0 < len(short) < len(targets) else targets


def _narrow_targets(config: Any, found: Sequence[str]) -> None:
    """What is meant, spelled out as full paths: the core then has nothing to interpret."""
    config.__dict__["written"] = config.target_modules
    config.target_modules = list(found)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    for field in config.subsets:
        wanted = getattr(config, field)
        if isinstance(wanted, (list, tuple, set)):
            setattr(config, field, [entry for entry in wanted if any(matches(path, entry) for path in found)])


def _narrow_patterns(config: Any, found: Sequence[str]) -> None:
    for field in config.patterns:
        patterns = getattr(config, field, None) or {}
        unused = [p for p in patterns if not any(re.match(rf"(.*\.)?({p})$", path) for path in found)]
        if unused and field in ("rank_pattern", "alpha_pattern"):
            warnings.warn(
                f"The following {field} keys did not match any targeted module and were ignored: {sorted(unused)}.",
                RuntimeWarning,
                stacklevel=4,
            )
        if unused:
            setattr(config, field, {p: value for p, value in patterns.items() if p not in unused})


def has_adapters(model: nn.Module) -> bool:
    return any(bare(module) is not module for module in model.modules())


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """Which modules a config means, and which not."""

    config = tuner.peft_config[adapter_name]
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for path, _ in walk(tuner.model):
        if path:
            found["matched" if check_target_module_exists(config, path) else "unmatched"].append(path)
    return found


def find_minimal_target_modules(target_modules: Iterable[str], other_module_names: Iterable[str]) -> set[str]:
    """The fewest name endings that mean all of the targets and none of the other modules.

    Raises:
        ValueError: the targets are no list or set of names, one is empty, or one means another module too.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError("target_modules should be a list or set of strings.")
    wanted, others = set(target_modules), set(other_module_names)
    if "" in wanted:
        raise ValueError("target_modules should not contain an empty string.")
    if wanted & others:
        raise ValueError(
            "target_modules and other_module_names contain common elements, this should not happen, please open a "
            "GitHub issue at https://github.com/huggingface/peft/issues with the code to reproduce this issue: "
            f"{sorted(wanted & others)}"
        )
    endings: set[str] = set()
    for path in sorted(wanted):
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            ending = ".".join(parts[-length:])
            if not any(other == ending or other.endswith("." + ending) for other in others):
                endings.add(ending)
                break
    return {e for e in endings if not any(e != f and e.endswith("." + f) for f in endings)}
