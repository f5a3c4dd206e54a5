"""Attach adapters to a model and detach them, with the semantics of PEFT's tuners."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..core import attach as core_attach
from ..core.adapter import Replace
from ..core.config import PromptConfig
from ..core.state import State, state_of
from ..errors import VeneerError
from ..files.read import PREFIX
from ..methods.families.tied import TokenAdapter
from ..model.schedule import follow
from ..targets.walk import walk
from ..upstream.models import task_of
from .configs import Names, PeftConfig, as_peft
from .helpers import random_mask
from .layers import BaseTunerLayer, PeftLayer, agree, is_flat, names_of
from .matching import check_target_module_exists, fill_defaults, narrowed, shortened
from .old_experts import EXACT_TARGETS, modernise
from .strict import is_strict
from .tables import methods as table
from .wording import pefts_words

REWRITTEN = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")
"""Config fields that are rewritten for architectures whose modules have since been fused."""


@pefts_words()
def put_on(
    model: nn.Module, config: Any, name: str, *, on_meta: bool = False, lift: bool = True, state_dict: Any = None
) -> State:
    """Attach the adapter that `config` describes and record in the config what was resolved for this model."""
    original = config
    config = as_peft(original)
    if not isinstance(config, PeftConfig):
        raise VeneerError(f"The input config must be a PeftConfig, got {type(original)}")
    check_rank(config)
    _rewrite_targets(model, original, config)
    if state_dict is not None:
        config = _by_keys(model, config, state_dict)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    _make_room(model, name)
    resolved = narrowed(model, config)
    if isinstance(resolved, PromptConfig) and resolved.task_type is None:
        resolved.task_type = task_of(model)
    if config.__dict__.get("from_file") and getattr(config, "mask_type", None) == "custom":
        resolved.mask_fn = random_mask  # SHiRA's file has the places that the custom function chose
    task = resolved.task_type
    if resolved.peft_type != "SHADOW":  # SHADOW needs the task to choose its own head
        resolved.task_type = None  # PEFT's model classes add the heads of a task
    trainable = not config.inference_mode
    try:
        state = core_attach.attach(
            model, resolved, name, trainable=trainable, on_meta=on_meta, lift=lift, layer_class=PeftLayer
        )
    except BaseException:
        _restore(flags)
        raise
    resolved.task_type = task
    _share_equal(state, name)
    warn_of_layout(config, resolved)
    warn_of_missing_bias(config, state.adapters(name))
    if trainable:
        follow(state, name)
    _record_resolved(original, config, resolved, state.adapters(name))
    state.configs[name] = original if isinstance(original, PeftConfig) else config
    if name in state.prompts:
        is_fixed = resolved.peft_type == "CARTRIDGE" and config.inference_mode
        state.prompts[name].requires_grad_(not is_fixed)
    model.peft_config = state.configs  # type: ignore[assignment]
    _hide(model, state)
    return state


def _share_equal(state: State, name: str) -> None:
    """Let an adapter use the fixed tensors of another one for its layers, if they are equal, as from an equal seed."""
    new = state.shared.get(name)
    if new is None or not is_flat(new):
        return
    for other, shared in state.shared.items():
        if other == name or type(shared) is not type(new):
            continue
        for attribute, tensor in new._buffers.items():
            old = shared._buffers.get(attribute)
            if old is not None and tensor is not None and old.dtype == tensor.dtype and torch.equal(old, tensor):
                new._buffers[attribute] = old


def _make_room(model: nn.Module, name: str) -> None:
    """Freeze a model that has no adapters yet; otherwise detach an older adapter of the same name."""
    state = _current(model)
    if state is None:
        model.requires_grad_(False)
    elif name in state.configs:
        core_attach.detach(model, name, state)


def _restore(flags: Sequence[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)


def _rewrite_targets(model: nn.Module, original: Any, config: Any) -> None:
    """Rewrite the targets of older architectures and long lists of paths as PEFT does, also in the caller's config."""
    if not (is_strict() or original.__dict__.get(EXACT_TARGETS)):
        modernise(model, config)
    if hasattr(config, "target_modules"):
        config.target_modules = shortened(model, config)
    for field in REWRITTEN:
        if hasattr(config, field):
            original.__dict__[field] = getattr(config, field)


def _record_resolved(original: Any, config: Any, resolved: Any, adapters: dict[str, Any]) -> None:
    """Write into the config the values that were resolved for the fields it left open."""
    defaults = resolved.__dict__.pop("filled", {})
    for field, value in resolved.__dict__.items():
        if getattr(config, field, None) is None:
            default = defaults.get(field, value)
            if field == "target_modules" and type(default) is list:
                default = Names(default)
            original.__dict__[field] = default
    if getattr(original, "target_modules", None) == "all-linear":
        original.target_modules = Names(_targeted_paths(adapters))
    config.__dict__.update(original.__dict__)


def _targeted_paths(adapters: dict[str, Any]) -> list[str]:
    paths = []
    for path, adapter in adapters.items():
        if any(is_targeted(part) for part in adapter.parts):
            paths.append(path)
    return paths


def warn_of_layout(original: Any, resolved: Any) -> None:
    """Warn where a config was wrong about how the weights are stored, as PEFT does."""
    before = getattr(original, "fan_in_fan_out", False)
    after = getattr(resolved, "fan_in_fan_out", False)
    if before != after and not is_strict():
        kind = "Conv1D" if after else "torch.nn.Linear"
        warnings.warn(
            f"fan_in_fan_out is set to {before} but the target module is `{kind}`. Setting fan_in_fan_out to {after}.",
            stacklevel=4,
        )


def warn_of_missing_bias(config: Any, adapters: dict[str, Any]) -> None:
    """Warn of modules without a bias, into which an adapter that has one cannot be merged, as PEFT does."""
    from .utils import PeftWarning

    is_beft = config.peft_type.value == "BEFT"
    if is_strict() or not (is_beft or getattr(config, "lora_bias", False)):
        return
    for adapter in adapters.values():
        for part in adapter.parts:
            if not is_targeted(part) or getattr(part.target.base, "bias", None) is not None:
                continue
            if is_beft:
                warnings.warn(
                    "Detected that the base layer has no bias term. Note you cannot merge the BEFT adapter into the "
                    "base layer.",
                    stacklevel=4,
                )
            else:
                warnings.warn(
                    f"`lora_bias=True` was passed but the targeted layer of type {type(part.target.base).__name__} has "
                    "no bias. This means that merging LoRA weights won't be possible.",
                    PeftWarning,
                    stacklevel=4,
                )


def check_rank(config: Any) -> None:
    """Raise the error that was found when the config was made and, as in PEFT, deferred until it is used."""
    error = config.__dict__.get("refused")
    if error is None:
        return
    r = getattr(config, "r", None)
    if isinstance(r, int) and r <= 0 and " must be at least 1" in str(error):
        raise VeneerError(f"`r` should be a positive integer value but the value passed is {r}")
    raise error


def is_targeted(part: Any) -> bool:
    """Whether a part is there because of the targets: neither a trained copy of the module nor trained tokens."""
    return not isinstance(part, (Replace, TokenAdapter))


def _hide(model: nn.Module, state: State) -> None:
    """Take shared modules and prompts out of the model's children: the layers and the `PeftModel` show them."""
    if all(is_flat(shared) for shared in state.shared.values()):
        model._modules.pop("veneer_shared", None)
    model._modules.pop("veneer_prompts", None)


def _current(model: nn.Module) -> State | None:
    """The state of a model, without layers that another library has taken out of it (diffusers does this)."""
    state = state_of(model)
    if state is None:
        return None
    present = {id(module) for module in model.modules()}
    for path, layer in list(state.layers.items()):
        if id(layer) not in present:
            del state.layers[path]
    empty = [name for name in state.configs if next(state.modules(name), None) is None]
    for name in empty:
        core_attach.detach(model, name, state)
    return state_of(model)


def _by_keys(model: nn.Module, config: Any, state_dict: dict[str, Any]) -> Any:
    """A copy of the config whose targets are the modules that a state dict has keys for."""
    paths = _paths_of_keys(config, state_dict)
    by_keys = copy.copy(config)
    by_keys.target_modules = sorted(paths)
    by_keys.exclude_modules = None
    by_keys.layers_to_transform = None
    by_config = copy.copy(config)
    fill_defaults(model, by_config)
    targets = [path for path, _ in walk(model) if path and check_target_module_exists(by_config, path)]
    _warn_unlike(paths, targets)
    return by_keys


def _paths_of_keys(config: Any, state_dict: dict[str, Any]) -> set[str]:
    marker = "." + table.METHODS[config.peft_type.value].prefix
    paths = set()
    for key in state_dict:
        if marker not in key:
            continue
        path = key.rsplit(marker, 1)[0].removeprefix("_orig_mod.")
        if path != "base_model":  # the tensors that layers share
            paths.add(path.removeprefix(PREFIX))
    return paths


def _warn_unlike(of_keys: set[str], of_config: Sequence[str]) -> None:
    only_config = sorted(set(of_config) - of_keys)
    only_keys = sorted(of_keys - set(of_config))
    message = ""
    if only_config:
        message += f"The PEFT config contained these additional target modules: {only_config}. "
    if only_keys:
        message += f"The state_dict contained these additional target modules: {only_keys}. "
    if message:
        warnings.warn(
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
            "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
            + message,
            RuntimeWarning,
            stacklevel=5,
        )


def activate(state: State, names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Make adapters the active ones and, as in PEFT, the only trainable ones."""
    active = names_of(names)
    _check_copies(state, active)
    merged = [layer for layer in state.layers.values() if layer.merged_adapters]
    if merged:
        warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
        for layer in merged:
            layer.unmerge()
    if inference_mode:
        state.trainable = state.trainable - set(active)
    else:
        state.trainable = state.trainable | set(active)
    flags = []
    for prompt in state.prompts.values():
        flags += [(parameter, parameter.requires_grad) for parameter in prompt.parameters()]
    state.activate(active)
    agree(state)
    for name in state.configs:
        _require_grad(state, name, name in active and not inference_mode)
    _restore(flags)  # PEFT leaves requires_grad of prompts as it is


def _check_copies(state: State, names: Sequence[str]) -> None:
    """Raise if a module would have to run with more than one of its trained copies."""
    for layer in state.layers.values():
        copies = [name for name in names if name in layer.adapters]
        if getattr(layer, "is_copy", False) and len(copies) > 1:
            raise VeneerError(f"Only one adapter can be set at a time for {layer._get_name()}, got {len(copies)}")


def _require_grad(state: State, name: str, requires_grad: bool) -> None:
    for parameter in state.parameters(name):
        parameter.requires_grad_(requires_grad)


def enable(state: State, enabled: bool) -> None:
    """Switch all adapters on or off; as in PEFT, adapters that are off require no gradients."""
    state.enabled = enabled
    agree(state)
    if enabled:
        activate_quietly(state)
        return
    for name in state.configs:
        if name not in state.prompts:
            _require_grad(state, name, False)


def activate_quietly(state: State) -> None:
    """Make the active adapters, except prompts, trainable again."""
    state.trainable |= set(state.active)
    for name in state.active:
        if name in state.configs and name not in state.prompts:
            _require_grad(state, name, True)


def take_off(model: nn.Module, name: str, state: State) -> list[str]:
    """Delete an adapter; return what is active afterwards: the other active ones, or the first that is left."""
    if any(name in layer.merged_adapters for layer in state.layers.values()):
        raise VeneerError(f"Cannot delete adapter(s) {[name]} while they are merged. Please unmerge them first.")
    was_active = name in state.active
    core_attach.detach(model, name, state)
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


def _existing(model: nn.Module) -> tuple[nn.Module, State]:
    """The adapted model, without a `PeftModel` around it, and its state."""
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
    """Attach an adapter to any module in place, without a `PeftModel` around it."""
    kind = peft_config.peft_type.value
    if isinstance(peft_config, PromptConfig) or kind in ("ADAPTION_PROMPT", "SHADOW"):
        raise VeneerError("`create_and_replace` does not support prompt learning, adaption prompt and shadow yet.")
    if table.METHODS[kind].shares:
        raise VeneerError(
            f"`inject_adapter_in_model` does not support {peft_config.peft_type} because it uses shared state stored "
            "on the tuner. Please use `get_peft_model` instead."
        )
    inner = getattr(model, "_orig_mod", model)  # a compiled model sees the adapters of its original module
    state = put_on(inner, peft_config, adapter_name, on_meta=low_cpu_mem_usage, lift=False, state_dict=state_dict)
    activate(state, adapter_name, peft_config.inference_mode)
    return model


def set_adapter(
    model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False, layer_cls: Any = BaseTunerLayer
) -> None:
    """Make adapters of any model the active ones."""
    _, state = _existing(model)
    activate(state, adapter_name, inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str, layer_cls: Any = BaseTunerLayer
) -> list[str] | None:
    """Delete an adapter of any model; return the adapters that are active afterwards, or None if there are none."""
    inner, state = _existing(model)
    if adapter_name not in state.configs:
        return list(state.active) or None
    return take_off(inner, adapter_name, state) or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Make adapters trainable or not, whether they are active or not."""
    _, state = _existing(model)
    for name in names_of(adapter_names):
        if name not in state.configs:
            continue
        _require_grad(state, name, requires_grad)
        if requires_grad:
            state.trainable = state.trainable | {name}
        else:
            state.trainable = state.trainable - {name}


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Upcast an adapter in half precision to fp32."""
    inner, state = _existing(model)
    if autocast_adapter_dtype and adapter_name in state.configs:
        core_attach.settle(inner, state, adapter_name, lift=True)
