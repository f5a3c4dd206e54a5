"""Selecting the modules that a config adapts. An entry of a targeting field that matches nothing is an error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from ..errors import TargetError, listing, nearest, warn
from ..files.regex import fits, pattern
from ..targets.roles import head_paths, is_linear
from ..targets.target import adapts, is_conv1d, kind_of
from ..targets.walk import matches, walk
from .config import TASK_HEADS, Config, LayerConfig

Modules = Mapping[str, nn.Module]
"""Modules by path."""


def saved_modules(model: nn.Module, config: Config) -> list[str]:
    """Paths of the modules that `config` trains in full, including the task's head.

    Adds the head's names to `config.modules_to_save`, as in PEFT's files.

    Raises:
        TargetError: an entry of the user's matches no module.
    """
    paths = [path for path, _ in walk(model) if path]
    heads = list(TASK_HEADS.get(config.task_type, ()))  # type: ignore[call-overload]
    names = list(config.modules_to_save or ())
    for entry in names:
        if entry not in heads and not any_matches(paths, entry):
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
        saved: paths of the modules that are trained in full; modules inside them are not adapted.
        bare: (module path, name) of the bare parameters that are adapted; keys of `rank_pattern` may match these too.

    Raises:
        TargetError: an entry matches nothing, or a module that the method cannot adapt.
    """
    modules = _outside(model, saved)
    is_given = config.target_modules is not None
    if not is_given:
        config.fill_targets(model)
    if saved and isinstance(config.target_modules, list):
        _check_not_inside(model, modules, config.target_modules, saved)
    chosen = _narrowed(modules, _targeted(model, modules, config), config)
    if not chosen:
        raise TargetError(f"target_modules = {config.target_modules!r}: exclude_modules excludes all matching modules")
    if is_given:
        _check_nothing_vanished(modules, chosen, config)
    elif isinstance(config.target_modules, list):
        config.target_modules = [entry for entry in config.target_modules if any_matches(chosen, entry)]
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
    if isinstance(config.target_modules, str):
        matching = _targeted(model, modules, config)
    else:
        matching = _matching_any(modules, config.target_modules or ())
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
        if any_matches(chosen, entry):
            continue
        matching = [path for path in modules if matches(path, entry)]
        raise TargetError(
            f"target_modules: {entry!r} adapts nothing, because {' and '.join(fields)} leave none of the modules it "
            f"matches:{listing(matching)}\nRemove the entry, or change the other fields."
        )


def parameters(model: nn.Module, config: LayerConfig, wanted: Sequence[str]) -> list[tuple[str, str]]:
    """(module path, name) of the bare parameters that match the entries of `target_parameters`.

    Raises:
        TargetError: an entry matches no parameter, or one that is neither a matrix nor a stack of matrices.
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


def pattern_matches(key: str, paths: Iterable[str], field: str) -> bool:
    """Whether a key of a field like `rank_pattern` matches one of the paths, whole or from a dot on."""
    return any(fits(rf"(.*\.)?({key})", path, field) for path in paths)


def check_patterns(field: str, patterns: Iterable[str], paths: Sequence[str]) -> None:
    """Raise TargetError unless each key of a field like `rank_pattern` matches the path of a target."""
    for key in patterns:
        if not pattern_matches(key, paths, field):
            raise TargetError(_no_match(field, key, paths))


def _outside(model: nn.Module, saved: Sequence[str]) -> dict[str, nn.Module]:
    """The modules by path, without those that are trained in full and the modules inside them."""
    inside = tuple(f"{path}." for path in saved)
    modules = {}
    for path, module in walk(model):
        if path and not f"{path}.".startswith(inside):
            modules[path] = module
    return modules


def _check_not_inside(model: nn.Module, modules: Modules, entries: Sequence[str], saved: Sequence[str]) -> None:
    """Raise TargetError if an entry only matches modules inside those that are trained in full."""
    everything = [path for path, _ in walk(model)]
    for entry in entries:
        if not any_matches(modules, entry) and any_matches(everything, entry):
            raise TargetError(
                f"target_modules: {entry!r} only matches modules inside those that modules_to_save trains in full "
                f"({', '.join(saved)}); remove it from one of the two"
            )


def _targeted(model: nn.Module, modules: Modules, config: LayerConfig) -> list[str]:
    """The paths that `target_modules` matches."""
    if config.target_modules != "all-linear":
        return _matching(modules, config.target_modules, "target_modules")
    heads = head_paths(model, dict(modules))
    linear: list[str] = []
    refused: list[str] = []
    for path, module in modules.items():
        if is_linear(module) and path not in heads:
            fits_method = adapts(config.adapter.kinds, module) and not _is_uncalled(module)
            (linear if fits_method else refused).append(path)
    if not linear:
        raise TargetError(f'target_modules = "all-linear": {type(model).__name__} has no linear layers')
    if refused:
        warn(
            f'target_modules = "all-linear" leaves out linear layers that {config.peft_type} cannot adapt, because '
            f"they compute something else or the model does not call them:{listing(refused)}"
        )
    return linear


def _is_uncalled(module: nn.Module) -> bool:
    """Whether this is the output layer of nn.MultiheadAttention, which reads its weight without calling it."""
    return type(module).__name__ == "NonDynamicallyQuantizableLinear"


def _matching(paths: Iterable[str], wanted: str | Sequence[str] | None, field: str) -> list[str]:
    """The paths that match a regular expression or an entry of a list. Each entry must match a path."""
    paths = list(paths)
    if isinstance(wanted, str):
        return _matching_expression(paths, wanted, field)
    entries = wanted or ()
    for entry in entries:
        if not any_matches(paths, entry):
            raise TargetError(_no_match(field, entry, paths))
    return _matching_any(paths, entries)


def _matching_any(paths: Iterable[str], entries: Sequence[str]) -> list[str]:
    """The paths that match an entry of a list."""
    return [path for path in paths if _matches_any(path, entries)]


def _matching_expression(paths: Sequence[str], expression: str, field: str) -> list[str]:
    matching = [path for path in paths if fits(expression, path, field)]
    if matching:
        return matching
    if any_matches(paths, expression):
        raise TargetError(
            f"{field}: a string is a regular expression for whole paths, and {expression!r} matches none; to select "
            f"modules by name, give a list: [{expression!r}]"
        )
    raise TargetError(_no_match(field, expression, paths))


def any_matches(paths: Iterable[str], entry: str) -> bool:
    """Whether an entry such as "q_proj" matches one of the paths."""
    return any(matches(path, entry) for path in paths)


def _matches_any(path: str, entries: Iterable[str]) -> bool:
    return any(matches(path, entry) for entry in entries)


def _without_excluded(modules: Modules, chosen: list[str], exclude: str | Sequence[str] | None) -> list[str]:
    if not exclude:
        return chosen
    excluded = set(_matching(modules, exclude, "exclude_modules"))
    return [path for path in chosen if path not in excluded]


def _of_layers(chosen: list[str], config: LayerConfig) -> list[str]:
    """The chosen paths that are in one of the layers in `layers_to_transform`."""
    wanted = config.layers_to_transform
    if wanted is None:
        return chosen
    numbers = [wanted] if isinstance(wanted, int) else list(wanted)
    if not numbers:
        raise TargetError("layers_to_transform = [] selects no layer; use None for all layers")
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
    """The index of the layer that a path belongs to, such as 3 for `model.layers.3.mlp`; None if it has none."""
    for name in patterns or [r"[^.]+"]:
        match = pattern(rf"(?:.*?\.)?(?:{name})\.(?P<index>\d+)\.", "layers_pattern").match(path + ".")
        if match:
            return int(match["index"])
    return None


def _check_kinds(chosen: list[str], modules: Modules, config: LayerConfig) -> None:
    """Raise TargetError unless the method can adapt every chosen module, and the model calls each of them."""
    kinds = config.adapter.kinds
    unfit = []
    uncalled = []
    for path in chosen:
        module = modules[path]
        class_name = type(module).__name__
        if not adapts(kinds, module):
            unfit.append(f"{path}: {kind_of(module).kind} ({class_name})")
        if _is_uncalled(module):
            uncalled.append(path)
    if unfit:
        raise TargetError(
            f"{config.adapter.__name__} adapts modules of the kinds {', '.join(sorted(kinds))}, but target_modules = "
            f"{config.target_modules!r} also matches:{listing(unfit)}\nGive more specific names."
        )
    if uncalled:
        raise TargetError(
            "nn.MultiheadAttention reads the weights of these modules without calling them, so adapters on them would "
            "never run. Leave them out with exclude_modules:" + listing(uncalled)
        )


def _no_match(field: str, entry: str, paths: Collection[str]) -> str:
    """The message for an entry that matches nothing, with the most similar endings of real paths."""
    paths = [path for path in paths if path]
    endings = []
    for length in range(1, entry.count(".") + 2):
        for path in paths:
            ending = ".".join(path.split(".")[-length:])
            if not ending.isdigit():
                endings.append(ending)
    close = nearest(entry, endings) or nearest(entry, paths)
    return f"{field}: {entry!r} matches none of the model's {len(paths)} modules{close}"
