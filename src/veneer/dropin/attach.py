"""Putting adapters on a model and taking them off, as PEFT's tuners do it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..core import attach as inject
from ..core.adapter import Replace
from ..core.config import PromptConfig
from ..core.state import State, state_of
from ..errors import VeneerError
from ..methods.families.tied import TokenAdapter
from ..model.schedule import follow
from ..targets.walk import walk
from ..upstream.models import task_of
from .configs import Names, PeftConfig, as_peft
from .layers import PeftLayer, agree, is_flat, names_of
from .matching import check_target_module_exists, fill_defaults, narrowed, shortened
from .old_experts import modernise
from .strict import is_strict
from .tables import methods as table

REWRITTEN = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")
"""Fields of a config that are changed for a model whose modules were joined since."""


def put_on(
    model: nn.Module, config: Any, name: str, *, on_meta: bool = False, lift: bool = True, state_dict: Any = None
) -> State:
    """Attach the adapter a config describes; the config itself is kept, with what was found for this model."""
    given, config = config, as_peft(config)
    if not isinstance(config, PeftConfig):
        raise VeneerError(f"The input config must be a PeftConfig, got {type(given)}")
    check_rank(config)
    _rewrite_targets(model, given, config)
    if state_dict is not None:
        config = _by_keys(model, config, state_dict)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    present = _current(model)
    if present is None:
        model.requires_grad_(False)
    elif name in present.configs:
        inject.detach(model, name, present)
    found = narrowed(model, config)
    if isinstance(found, PromptConfig) and found.task_type is None:
        found.task_type = task_of(model)
    task = found.task_type
    if found.peft_type != "SHADOW":  # which judges itself by the task
        found.task_type = None  # its heads are for PEFT's model classes to add
    try:
        state = inject.attach(model, found, name, trainable=not config.inference_mode, on_meta=on_meta, lift=lift)
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    found.task_type = task
    warn_of_layout(config, found)
    if not config.inference_mode:
        follow(state, name)
    _note_found(given, config, found, state.adapters(name))
    state.configs[name] = given if isinstance(given, PeftConfig) else config
    for parameter in state.prompts[name].parameters() if name in state.prompts else ():
        parameter.requires_grad_(True)
    model.peft_config = state.configs  # type: ignore[assignment]
    _hide(model, state)
    return state


def _rewrite_targets(model: nn.Module, given: Any, config: Any) -> None:
    """Targets of an older architecture, and long lists of paths, as PEFT rewrites them, also in the caller's config."""
    if not is_strict():
        modernise(model, config)
    if hasattr(config, "target_modules"):
        config.target_modules = shortened(model, config)
    given.__dict__.update({n: getattr(config, n) for n in REWRITTEN if hasattr(config, n)})


def _note_found(given: Any, config: Any, found: Any, adapters: dict[str, Any]) -> None:
    """Keep in the config what was found for this model where it left that open."""
    filled = found.__dict__.pop("filled", {})
    given.__dict__.update({n: filled.get(n, v) for n, v in found.__dict__.items() if getattr(config, n, None) is None})
    if getattr(given, "target_modules", None) == "all-linear":
        given.target_modules = Names(p for p, a in adapters.items() if any(map(is_targeted, a.parts)))
    config.__dict__.update(given.__dict__)


def warn_of_layout(given: Any, found: Any) -> None:
    """PEFT says so when a config is wrong about how weights are stored."""
    before, after = getattr(given, "fan_in_fan_out", False), getattr(found, "fan_in_fan_out", False)
    if before != after and not is_strict():
        kind = "Conv1D" if after else "torch.nn.Linear"
        warnings.warn(
            f"fan_in_fan_out is set to {before} but the target module is `{kind}`. Setting fan_in_fan_out to {after}.",
            stacklevel=4,
        )


def check_rank(config: Any) -> None:
    """Raise what was wrong with a config's settings when it was made."""
    refused, r = config.__dict__.get("refused"), getattr(config, "r", None)
    if refused is not None and isinstance(r, int) and r <= 0 and " must be at least 1" in str(refused):
        raise VeneerError(f"`r` should be a positive integer value but the value passed is {r}")
    if refused is not None:
        raise refused


def is_targeted(part: Any) -> bool:
    """It is what the targets asked for, no copy of the whole module and no tokens beside it."""
    return not isinstance(part, (Replace, TokenAdapter))


def _hide(model: nn.Module, state: State) -> None:
    """What layers share stands on the layers, and a prompt on the `PeftModel`: not in the model once more."""
    if all(is_flat(shared) for shared in state.shared.values()):
        model._modules.pop("veneer_shared", None)
    model._modules.pop("veneer_prompts", None)


def _current(model: nn.Module) -> State | None:
    """A model's state without the layers that a program has taken out of the model by itself (diffusers does)."""
    state = state_of(model)
    if state is None:
        return None
    there = {id(module) for module in model.modules()}
    for path, layer in list(state.layers.items()):
        if id(layer) not in there:
            del state.layers[path]
    for name in [n for n in state.configs if not any(True for _ in state.modules(n))]:
        inject.detach(model, name, state)
    return state_of(model)


def _by_keys(model: nn.Module, config: Any, state_dict: dict[str, Any]) -> Any:
    """A config whose targets are the modules that a state dict has keys for."""

    prefix = table.METHODS[config.peft_type.value].prefix
    paths = {key.rsplit("." + prefix, 1)[0].removeprefix("_orig_mod.") for key in state_dict if "." + prefix in key}
    found = copy.copy(config)
    of_layers = paths - {"base_model"}  # there is what they share
    found.target_modules = sorted(path.removeprefix("base_model.model.") for path in of_layers)
    found.exclude_modules = found.layers_to_transform = None
    wanted = copy.copy(config)
    fill_defaults(model, wanted)
    _warn_unlike(set(found.target_modules), [p for p, _ in walk(model) if p and check_target_module_exists(wanted, p)])
    return found


def _warn_unlike(of_keys: set[str], of_config: Sequence[str]) -> None:
    more, fewer = sorted(set(of_config) - of_keys), sorted(of_keys - set(of_config))
    message = f"The PEFT config contained these additional target modules: {more}. " if more else ""
    message += f"The state_dict contained these additional target modules: {fewer}. " if fewer else ""
    if message:
        warnings.warn(
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
            "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
            + message,
            RuntimeWarning,
            stacklevel=5,
        )


def activate(state: State, names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Make adapters the active ones, and, as in PEFT, those that learn."""
    wanted = names_of(names)
    for layer in state.layers.values():
        here = [name for name in wanted if name in layer.adapters]
        if getattr(layer, "is_copy", False) and len(here) > 1:
            raise VeneerError(f"Only one adapter can be set at a time for {layer._get_name()}, got {len(here)}")
    merged = [layer for layer in state.layers.values() if layer.merged_adapters]
    if merged:
        warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
        for layer in merged:
            layer.unmerge()
    state.trainable = state.trainable - set(wanted) | (set() if inference_mode else set(wanted))
    prompts = [(p, p.requires_grad) for prompt in state.prompts.values() for p in prompt.parameters()]
    state.activate(tuple(name for name in wanted))
    agree(state)
    for name in state.configs:
        learns = name in wanted and not inference_mode
        for parameter in state.parameters(name):
            parameter.requires_grad_(learns)
    for parameter, flag in prompts:  # PEFT leaves a prompt learning or not, active or not
        parameter.requires_grad_(flag)


def enable(state: State, enabled: bool) -> None:
    """Switch all adapters; PEFT also lets go of the gradients of those that are off."""
    state.enabled = enabled
    agree(state)
    if enabled:
        activate_quietly(state)
        return
    for name in state.configs:
        if name not in state.prompts:
            for parameter in state.parameters(name):
                parameter.requires_grad_(False)


def activate_quietly(state: State) -> None:
    state.trainable |= set(state.active)
    for name in state.active:
        if name in state.configs and name not in state.prompts:
            for parameter in state.parameters(name):
                parameter.requires_grad_(True)


def take_off(model: nn.Module, name: str, state: State) -> list[str]:
    """Delete an adapter. Returns what is active then: the rest, or the first of those that are left."""
    merged = sorted({n for layer in state.layers.values() for n in layer.merged_adapters if n == name})
    if merged:
        raise VeneerError(f"Cannot delete adapter(s) {merged} while they are merged. Please unmerge them first.")
    was_active = name in state.active
    inject.detach(model, name, state)
    _hide(model, state)
    agree(state)
    left = sorted(state.configs)
    if was_active and not state.active and left:
        warnings.warn(
            f"Adapter {name} was active which is now deleted. Setting active adapter to {left[0]}.", stacklevel=3
        )
        activate(state, left[0])
    return list(state.active)


def layers_of(model: nn.Module) -> list[PeftLayer]:
    return [module for module in model.modules() if isinstance(module, PeftLayer)]


# PEFT's functions on any model


def _existing(model: nn.Module) -> tuple[nn.Module, State]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    state = state_of(inner)
    if state is None:
        raise VeneerError("No adapter layers found in the model")
    return inner, state


def inject_adapter_in_model(
    peft_config: Any,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Put an adapter on any module in place, without a `PeftModel` around it."""
    kind = peft_config.peft_type.value
    if isinstance(peft_config, PromptConfig) or kind in ("ADAPTION_PROMPT", "SHADOW"):
        raise VeneerError("`create_and_replace` does not support prompt learning, adaption prompt and shadow yet.")
    if table.METHODS[kind].shares:
        raise VeneerError(
            f"`inject_adapter_in_model` does not support {peft_config.peft_type} because it uses shared state stored "
            "on the tuner. Please use `get_peft_model` instead."
        )
    inner = getattr(model, "_orig_mod", model)  # of a compiled model, which sees what is put on
    state = put_on(inner, peft_config, adapter_name, on_meta=low_cpu_mem_usage, lift=False, state_dict=state_dict)
    activate(state, adapter_name, peft_config.inference_mode)
    return model


def set_adapter(
    model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False, layer_cls: Any = None
) -> None:
    """Make adapters of any model the active ones."""
    activate(_existing(model)[1], adapter_name, inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: Any = None) -> list[str] | None:
    """Take an adapter off any model; returns the adapters that are active then, None without any."""
    inner, state = _existing(model)
    if adapter_name not in state.configs:
        return list(state.active) or None
    return take_off(inner, adapter_name, state) or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let adapters learn, or not, active or not."""
    state = _existing(model)[1]
    for name in names_of(adapter_names):
        if name in state.configs:
            for parameter in state.parameters(name):
                parameter.requires_grad_(requires_grad)
            state.trainable = state.trainable - {name} | ({name} if requires_grad else set())


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Lift an adapter in half precision to fp32."""
    inner, state = _existing(model)
    if autocast_adapter_dtype and adapter_name in state.configs:
        inject.settle(inner, state, adapter_name, lift=True)
