"""Which modules a config means. Each entry of each targeting field must match, else an error names it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from ..errors import TargetError, listing, nearest
from ..files.regex import fits, pattern
from ..targets.roles import head_paths, is_linear
from ..targets.target import adapts, is_conv1d, kind_of
from ..targets.walk import matches, walk
from .config import TASK_HEADS, Config, LayerConfig

Modules = Mapping[str, nn.Module]
"""Modules by path."""


def saved_modules(model: nn.Module, config: Config) -> list[str]:
    """Paths of the modules of which `config` trains a whole copy, including the task's head.

    Adds the head's names to `config.modules_to_save`, as PEFT's files have them.

    Raises:
        TargetError: an entry the user gave matches no module.
    """
    paths = [path for path, _ in walk(model) if path]
    heads = list(TASK_HEADS.get(config.task_type, ()))  # type: ignore[call-overload]
    names = list(config.modules_to_save or ())
    for entry in names:
        if entry not in heads and not _any_matches(paths, entry):
            raise TargetError(_no_match("modules_to_save", entry, paths))
    for head in heads:
        if head not in names:
            names.append(head)
    if names:
        config.modules_to_save = names
    matching = [path for path in paths if _matches_any(path, names)]
    return [path for path in matching if not any(path.startswith(outer + ".") for outer in matching)]


def targets(
    model: nn.Module, config: LayerConfig, saved: Sequence[str] = (), bare: Sequence[tuple[str, str]] = ()
) -> list[str]:
    """Paths of the modules that `config` adapts, in the model's order. Fills in `target_modules` when it is None.

    Args:
        saved: modules of which a whole copy is trained, with all that is inside them.
        bare: (module path, name) of the bare parameters it adapts; entries of `rank_pattern` may also mean these.

    Raises:
        TargetError: an entry matches nothing, or something the method cannot adapt.
    """
    modules = _outside(model, saved)
    if config.target_modules is None:
        config.fill_targets(model)
    if saved and isinstance(config.target_modules, list):
        _check_not_inside(model, modules, config.target_modules, saved)
    chosen = _narrowed(modules, _targeted(model, modules, config), config)
    if not chosen:
        raise TargetError(f"target_modules = {config.target_modules!r}: every match is excluded; nothing is left")
    _check_nothing_vanished(modules, chosen, config)
    _check_kinds(chosen, modules, config)
    for field in config.subsets:
        _matching(chosen, getattr(config, field), field)
    adapted = [*chosen, *map(".".join, bare)]
    for field in config.patterns:
        check_patterns(field, getattr(config, field) or (), adapted)
    config.fan_in_fan_out = any(is_conv1d(modules[path]) for path in chosen)
    return chosen


def targeted(model: nn.Module, config: LayerConfig) -> list[str]:
    """Paths of the modules that the targeting fields leave, in the model's order, without a check of each entry.

    Raises:
        TargetError: an entry of another field than `target_modules` matches nothing.
    """
    modules = _outside(model, ())
    entries = config.target_modules or ()
    if isinstance(entries, str):
        matching = _targeted(model, modules, config)
    else:
        matching = [path for path in modules if _matches_any(path, entries)]
    return _narrowed(modules, matching, config)


def _narrowed(modules: Modules, matching: list[str], config: LayerConfig) -> list[str]:
    """The matching paths that the other targeting fields leave."""
    included = _without_excluded(modules, matching, config.exclude_modules)
    return config.choose(_of_layers(included, config))


def _check_nothing_vanished(modules: Modules, chosen: Sequence[str], config: LayerConfig) -> None:
    """Raise where the other targeting fields leave nothing of what an entry of `target_modules` matches."""
    if not isinstance(config.target_modules, list):
        return
    fields = []
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        value = getattr(config, field)
        if value is not None:
            fields.append(f"{field} = {value!r}")
    if not fields:
        return
    for entry in config.target_modules:
        if _any_matches(chosen, entry):
            continue
        matching = [path for path in modules if matches(path, entry)]
        raise TargetError(
            f"target_modules: {entry!r} adapts nothing, because {' and '.join(fields)} leave none of the modules it "
            f"matches:{listing(matching)}\nRemove the entry, or change the other fields."
        )


def parameters(model: nn.Module, config: LayerConfig, wanted: Sequence[str]) -> list[tuple[str, str]]:
    """(module path, name) of the bare parameters that the entries of `target_parameters` mean.

    Raises:
        TargetError: an entry matches none, or one that is neither a matrix nor a stack of matrices.
    """
    places = {}
    shapes = {}
    for path, module in walk(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places[f"{path}.{name}"] = (path, name)
                shapes[f"{path}.{name}"] = tuple(parameter.shape)
    chosen = _matching(places, wanted, "target_parameters")
    wrong = [f"{full}: {shapes[full]}" for full in chosen if len(shapes[full]) not in (2, 3)]
    if wrong:
        raise TargetError(f"target_parameters: these are neither matrices nor stacks of matrices:{listing(wrong)}")
    return [places[full] for full in chosen]


def check_patterns(field: str, patterns: Iterable[str], paths: Sequence[str]) -> None:
    """Raise TargetError unless each key of a field like `rank_pattern` matches one of the targets' paths."""
    for key in patterns:
        if not any(fits(rf"(.*\.)?({key})", path, field) for path in paths):
            raise TargetError(_no_match(field, key, paths))


def _outside(model: nn.Module, saved: Sequence[str]) -> dict[str, nn.Module]:
    """The modules by path, without those of which a whole copy is trained."""
    inside = tuple(f"{path}." for path in saved)
    modules = {}
    for path, module in walk(model):
        if path and not f"{path}.".startswith(inside):
            modules[path] = module
    return modules


def _check_not_inside(model: nn.Module, modules: Modules, entries: Sequence[str], saved: Sequence[str]) -> None:
    """Raise where an entry matches only modules inside those of which a whole copy is trained."""
    everything = [path for path, _ in walk(model)]
    for entry in entries:
        if not _any_matches(modules, entry) and _any_matches(everything, entry):
            raise TargetError(
                f"target_modules: {entry!r} lies inside what modules_to_save trains whole ({', '.join(saved)})"
            )


def _targeted(model: nn.Module, modules: Modules, config: LayerConfig) -> list[str]:
    """What `target_modules` matches."""
    if config.target_modules != "all-linear":
        return _matching(modules, config.target_modules, "target_modules")
    heads = head_paths(model, dict(modules))
    linear = [path for path, module in modules.items() if is_linear(module) and path not in heads]
    if not linear:
        raise TargetError(f'target_modules = "all-linear": {type(model).__name__} has no linear layers')
    return linear


def _matching(paths: Iterable[str], wanted: str | Sequence[str] | None, field: str) -> list[str]:
    """The paths that match a regular expression, or any of a list of names, each of which must match."""
    paths = list(paths)
    if isinstance(wanted, str):
        return _matching_expression(paths, wanted, field)
    entries = wanted or ()
    for entry in entries:
        if not _any_matches(paths, entry):
            raise TargetError(_no_match(field, entry, paths))
    return [path for path in paths if _matches_any(path, entries)]


def _matching_expression(paths: Sequence[str], expression: str, field: str) -> list[str]:
    matching = [path for path in paths if fits(expression, path, field)]
    if matching:
        return matching
    if _any_matches(paths, expression):
        raise TargetError(
            f"{field}: {expression!r} is a regular expression for the whole path of a module, and matches none; "
            f"for modules of that name give a list, [{expression!r}]"
        )
    raise TargetError(_no_match(field, expression, paths))


def _any_matches(paths: Iterable[str], entry: str) -> bool:
    return any(matches(path, entry) for path in paths)


def _matches_any(path: str, entries: Iterable[str]) -> bool:
    return any(matches(path, entry) for entry in entries)


def _without_excluded(modules: Modules, chosen: list[str], exclude: str | Sequence[str] | None) -> list[str]:
    if not exclude:
        return chosen
    excluded = set(_matching(modules, exclude, "exclude_modules"))
    return [path for path in chosen if path not in excluded]


def _of_layers(chosen: list[str], config: LayerConfig) -> list[str]:
    """Those of the chosen paths that are in one of the layers of `layers_to_transform`."""
    wanted = config.layers_to_transform
    if wanted is None:
        return chosen
    numbers = [wanted] if isinstance(wanted, int) else list(wanted)
    if not numbers:
        raise TargetError("layers_to_transform = [] names no layer; None means all of them")
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    for name in patterns or ():
        if all(_layer_index(path, [name]) is None for path in chosen):
            raise TargetError(_no_match("layers_pattern", name, _path_parts(chosen)))
    inside = []
    present = set()
    for path in chosen:
        index = _layer_index(path, patterns)
        if index is not None:
            present.add(index)
        if index in numbers:
            inside.append(path)
    for number in numbers:
        if number not in present:
            layers = sorted(present)
            raise TargetError(f"layers_to_transform: no target lies in layer {number}; targets lie in layers {layers}")
    return inside


def _path_parts(paths: Iterable[str]) -> set[str]:
    parts: set[str] = set()
    for path in paths:
        parts.update(path.split("."))
    return parts


def _layer_index(path: str, patterns: Sequence[str] | None) -> int | None:
    """The index of the layer that a path is in: 3 for `model.layers.3.mlp`."""
    for name in patterns or [r"[^.]+"]:
        match = pattern(rf"(?:.*?\.)?(?:{name})\.(?P<index>\d+)\.", "layers_pattern").match(path + ".")
        if match:
            return int(match["index"])
    return None


def _check_kinds(chosen: list[str], modules: Modules, config: LayerConfig) -> None:
    """Raise unless the method adapts every chosen module, and the model calls each of them."""
    kinds = config.adapter.kinds
    unfit = []
    uncalled = []
    for path in chosen:
        module = modules[path]
        class_name = type(module).__name__
        if not adapts(kinds, module):
            unfit.append(f"{path}: {kind_of(module).kind} ({class_name})")
        if class_name == "NonDynamicallyQuantizableLinear":
            uncalled.append(path)
    if unfit:
        raise TargetError(
            f"{config.adapter.__name__} adapts {', '.join(sorted(kinds))}, not what target_modules = "
            f"{config.target_modules!r} also matches:{listing(unfit)}\nName the modules more exactly."
        )
    if uncalled:
        raise TargetError(
            "these are read by nn.MultiheadAttention without being called, so an adapter on them would never run:"
            + listing(uncalled)
        )


def _no_match(field: str, entry: str, paths: Collection[str]) -> str:
    """The message for an entry that matches nothing, with the nearest endings of real paths, as long as the entry."""
    paths = [path for path in paths if path]
    endings = []
    for length in range(1, entry.count(".") + 2):
        for path in paths:
            ending = ".".join(path.split(".")[-length:])
            if not ending.isdigit():
                endings.append(ending)
    close = nearest(entry, endings) or nearest(entry, paths)
    return f"{field}: {entry!r} matches none of the model's {len(paths)} modules{close}"
