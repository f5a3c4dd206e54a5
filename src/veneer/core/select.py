"""Which modules a config means. Each entry of each targeting field must match, else an error names it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from ..errors import TargetError, listing, nearest
from ..files.regex import fits, pattern
from ..targets.roles import head_paths, is_linear
from ..targets.target import adapts, is_conv1d, kind_of
from ..targets.walk import matches, walk
from .config import TASK_HEADS, Config, LayerConfig


def saved_modules(model: nn.Module, config: Config) -> list[str]:
    """Paths of the modules of which `config` trains a whole copy, the task's head among them.

    Adds the head's names to `config.modules_to_save`, as PEFT's files have them.

    Raises:
        TargetError: an entry the user gave matches no module.
    """
    paths = [path for path, _ in walk(model) if path]
    heads = list(TASK_HEADS.get(config.task_type, ()))  # type: ignore[call-overload]
    given = list(config.modules_to_save or ())
    for entry in given:
        if entry not in heads and not any(matches(path, entry) for path in paths):
            raise TargetError(_no_match("modules_to_save", entry, paths))
    names = [*given, *(head for head in heads if head not in given)]
    if names:
        config.modules_to_save = names
    found = [path for path in paths if any(matches(path, name) for name in names)]
    return [path for path in found if not any(path.startswith(outer + ".") for outer in found)]


def targets(
    model: nn.Module, config: LayerConfig, saved: Sequence[str] = (), bare: Sequence[tuple[str, str]] = ()
) -> list[str]:
    """Paths of the modules that `config` adapts, in the model's order. Fills in `target_modules` when it is None.

    Patterns may also mean one of the `bare` parameters that it adapts.

    Raises:
        TargetError: an entry matches nothing, or something the method cannot adapt.
    """
    modules = {p: m for p, m in walk(model) if p and not any(p == s or p.startswith(s + ".") for s in saved)}
    if config.target_modules is None:
        config.fill_targets(model)
    if saved and isinstance(config.target_modules, list):
        hidden = [e for e in config.target_modules if not any(matches(p, e) for p in modules)]
        hidden = [e for e in hidden if any(matches(p, e) for p, _ in walk(model))]
        if hidden:
            raise TargetError(
                f"target_modules: {hidden[0]!r} lies inside what modules_to_save trains whole ({', '.join(saved)})"
            )
    found = _wanted(model, modules, config)
    found = _excluded(modules, found, config.exclude_modules)
    found = config.choose(_of_layers(found, config))
    if not found:
        raise TargetError(f"target_modules = {config.target_modules!r}: every match is excluded; nothing is left")
    _check_kinds(found, modules, config)
    for field in config.subsets:
        _matching(found, getattr(config, field), field)
    for field in config.patterns:
        check_patterns(field, getattr(config, field) or (), [*found, *map(".".join, bare)])
    config.fan_in_fan_out = any(is_conv1d(modules[path]) for path in found)
    return found


def parameters(model: nn.Module, config: LayerConfig, wanted: Sequence[str]) -> list[tuple[str, str]]:
    """(path of the module, name) of the bare parameters that the entries of `target_parameters` mean.

    Raises:
        TargetError: an entry matches none, or not a matrix or a stack of matrices.
    """
    there = {(path, name): p for path, module in walk(model) for name, p in module._parameters.items() if p is not None}
    found = {f"{path}.{name}": (path, name) for path, name in there}
    chosen = [found[full] for full in _matching(found, wanted, "target_parameters")]
    wrong = [f"{p}.{n}: {tuple(there[p, n].shape)}" for p, n in chosen if there[p, n].dim() not in (2, 3)]
    if wrong:
        raise TargetError(f"target_parameters: these are neither matrices nor stacks of matrices:{listing(wrong)}")
    return chosen


def _wanted(model: nn.Module, modules: dict[str, nn.Module], config: LayerConfig) -> list[str]:
    wanted = config.target_modules
    if wanted == "all-linear":
        heads = head_paths(model, modules)
        found = [path for path, module in modules.items() if is_linear(module) and path not in heads]
        if not found:
            raise TargetError(f'target_modules = "all-linear": {type(model).__name__} has no linear layers')
        return found
    return _matching(modules, wanted, "target_modules")


def _matching(paths: Iterable[str], wanted: str | Sequence[str] | None, field: str) -> list[str]:
    """The paths that match a regular expression, or any of a list of names, each of which must match."""
    paths = list(paths)
    if isinstance(wanted, str):
        found = [path for path in paths if fits(wanted, path, field)]
        if not found and any(matches(path, wanted) for path in paths):
            raise TargetError(
                f"{field}: {wanted!r} is a regular expression for the whole path of a module, and matches none; "
                f"for modules of that name give a list, [{wanted!r}]"
            )
        if not found:
            raise TargetError(_no_match(field, wanted, paths))
        return found
    for entry in wanted or ():
        if not any(matches(path, entry) for path in paths):
            raise TargetError(_no_match(field, entry, paths))
    return [path for path in paths if any(matches(path, entry) for entry in wanted or ())]


def _excluded(modules: dict[str, nn.Module], found: list[str], exclude: str | Sequence[str] | None) -> list[str]:
    if not exclude:
        return found
    out = set(_matching(modules, exclude, "exclude_modules"))
    return [path for path in found if path not in out]


def _of_layers(found: list[str], config: LayerConfig) -> list[str]:
    if config.layers_to_transform is None:
        return found
    wanted = config.layers_to_transform
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    if not wanted:
        raise TargetError("layers_to_transform = [] names no layer; None means all of them")
    for name in patterns or ():
        if all(_layer_index(path, [name]) is None for path in found):
            raise TargetError(_no_match("layers_pattern", name, {p for path in found for p in path.split(".")}))
    index = {path: _layer_index(path, patterns) for path in found}
    for number in wanted:
        if number not in index.values():
            have = sorted({i for i in index.values() if i is not None})
            raise TargetError(f"layers_to_transform: no target lies in layer {number}; targets lie in layers {have}")
    return [path for path in found if index[path] in wanted]


def _layer_index(path: str, patterns: Sequence[str] | None) -> int | None:
    """The index of the layer a path lies in: `model.layers.3.mlp` is 3."""
    for name in patterns or [r"[^.]+"]:
        found = pattern(rf"(?:.*?\.)?(?:{name})\.(?P<index>\d+)\.", "layers_pattern").match(path + ".")
        if found:
            return int(found["index"])
    return None


def _check_kinds(found: list[str], modules: dict[str, nn.Module], config: LayerConfig) -> None:
    kinds = config.adapter.kinds
    wrong = [p for p in found if not adapts(kinds, modules[p])]
    if wrong:
        lines = [f"{p}: {kind_of(modules[p]).kind} ({type(modules[p]).__name__})" for p in wrong]
        raise TargetError(
            f"{config.adapter.__name__} adapts {', '.join(sorted(kinds))}, not what target_modules = "
            f"{config.target_modules!r} also matches:{listing(lines)}\nName the modules more exactly."
        )
    uncalled = [p for p in found if type(modules[p]).__name__ == "NonDynamicallyQuantizableLinear"]
    if uncalled:
        raise TargetError(
            "these are read by nn.MultiheadAttention without being called, so an adapter on them would never run:"
            + listing(uncalled)
        )


def check_patterns(field: str, patterns: Iterable[str], found: Sequence[str]) -> None:
    """Each key of `rank_pattern`, `alpha_pattern` and their like must match a target."""
    for key in patterns:
        if not any(fits(rf"(.*\.)?({key})", path, field) for path in found):
            raise TargetError(_no_match(field, key, found))


def _no_match(field: str, entry: str, paths: Iterable[str]) -> str:
    paths = [path for path in paths if path]
    lengths = range(1, entry.count(".") + 2)
    endings = [".".join(path.split(".")[-n:]) for n in lengths for path in paths]
    close = nearest(entry, [ending for ending in endings if not ending.isdigit()]) or nearest(entry, paths)
    return f"{field}: {entry!r} matches none of the model's {len(paths)} modules{close}"
