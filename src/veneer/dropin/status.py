"""PEFT's status reports on layers and models: which adapters are enabled, active, merged and trainable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..errors import VeneerError
from ..model.peft_model import PeftModel
from .layers import PeftLayer


@dataclass
class TunerLayerStatus:
    """The adapters of one module."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The adapters of a whole model; "irregular" if its layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapted module of any model."""
    root = model.base_model if isinstance(model, PeftModel) else model
    _check_kind(model, "get_layer_status")
    layers = [_layer_status(path, module) for path, module in root.named_modules() if isinstance(module, PeftLayer)]
    if not layers:
        raise VeneerError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters "
            "injected in the model."
        )
    return layers


def _check_kind(model: nn.Module, function: str) -> None:
    """Raise TypeError for prompt methods and adaption prompts, which have no layers."""
    kind = None
    if isinstance(model, PeftModel):
        kind = getattr(getattr(model, "peft_type", None), "value", None)
    if kind == "ADAPTION_PROMPT" or getattr(model, "_is_prompt_learning", False):
        raise TypeError(
            f"{function}() got an invalid PeftModel instance; prefix tuning and adaption prompt are not supported."
        )


def _layer_status(path: str, layer: PeftLayer) -> TunerLayerStatus:
    requires_grad = {}
    devices = {}
    for name, adapter in layer.adapters.items():
        requires_grad[name] = agreed(parameter.requires_grad for parameter in layer.learned(name))
        tensors = (*adapter.parameters(), *adapter.buffers())
        devices[name] = sorted({tensor.device.type for tensor in tensors})
    return TunerLayerStatus(
        name=path,
        module_type=layer._get_name(),
        enabled=not layer.disable_adapters,
        active_adapters=layer.active_adapters,
        merged_adapters=layer.merged_adapters,
        requires_grad=requires_grad,
        available_adapters=sorted(layer._get_available_adapters()),
        devices=devices,
        quantization_backend=None,
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of the adapters of any model."""
    _check_kind(model, "get_model_status")
    layers = get_layer_status(model)
    base_model_type = type(model).__name__ if hasattr(model, "config") else "other"
    adapter_model_type = "None"
    peft_types = {}
    if isinstance(model, PeftModel):
        base_model_type = type(model.get_base_model()).__name__
        adapter_model_type = type(model.base_model).__name__
        peft_types = {name: config.peft_type.value for name, config in model.peft_config.items()}  # type: ignore[union-attr]
    requires_grad = {}
    devices = {}
    names = sorted(set[str]().union(*(layer.available_adapters for layer in layers)))
    for name in names:
        requires_grad[name] = agreed(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
        devices[name] = sorted(set[str]().union(*(layer.devices.get(name, ()) for layer in layers)))
    trainable_params, total_params = _count_parameters(model)
    return TunerModelStatus(
        base_model_type=base_model_type,
        adapter_model_type=adapter_model_type,
        peft_types=peft_types,
        trainable_params=trainable_params,
        total_params=total_params,
        num_adapter_layers=len(layers),
        enabled=agreed(layer.enabled for layer in layers),
        active_adapters=_active(layers),
        merged_adapters=_merged(layers),
        requires_grad=requires_grad,
        available_adapters=names,
        devices=devices,
        quantization_backend=None,
    )


def _count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all): numbers of values in a model's parameters."""
    trainable = 0
    total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            trainable += parameter.numel()
    return trainable, total


def agreed(flags: Iterable[bool | str]) -> bool | str:
    """The value that all flags have; True if there are none, "irregular" if they differ."""
    values = set(flags)
    if values <= {True}:
        return True
    return False if values == {False} else "irregular"


def _active(layers: list[TunerLayerStatus]) -> list[str] | str:
    """The active adapters of all layers; "irregular" if they differ."""
    active = {tuple(layer.active_adapters) for layer in layers}
    return list(active.pop()) if len(active) == 1 else "irregular"


def _merged(layers: list[TunerLayerStatus]) -> list[str] | str:
    """The adapters merged in any layer; "irregular" if one of them is not merged in another layer that has it."""
    merged = set[str]().union(*(layer.merged_adapters for layer in layers))
    for layer in layers:
        unmerged = set(layer.available_adapters) - set(layer.merged_adapters)
        if unmerged & merged:
            return "irregular"
    return sorted(merged)
