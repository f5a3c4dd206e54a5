"""Status reports: the adapters of each layer and of the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.state import State
from .counting import count


@dataclass(frozen=True)
class LayerStatus:
    """The adapters of one adapted module."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass(frozen=True)
class ModelStatus:
    """The adapters of the whole model; "irregular" means that its layers differ."""

    base_model_type: str | None
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def layer_status(state: State) -> list[LayerStatus]:
    """The status of every adapted module."""
    return [_layer(path, layer, state) for path, layer in state.layers.items()]


def _layer(path: str, layer: Any, state: State) -> LayerStatus:
    first_adapter = next(iter(layer.adapters.values()))
    requires_grad = {}
    devices = {}
    for name, adapter in layer.adapters.items():
        parameters = list(adapter.parameters())
        requires_grad[name] = any(parameter.requires_grad for parameter in parameters)
        devices[name] = _devices(parameters)
    return LayerStatus(
        name=path,
        module_type=type(first_adapter).__name__,
        enabled=state.enabled,
        active_adapters=[name for name in state.active if name in layer.adapters],
        merged_adapters=list(layer.merged_adapters),
        requires_grad=requires_grad,
        available_adapters=sorted(layer.adapters.keys()),
        devices=devices,
    )


def model_status(state: State, model: nn.Module) -> ModelStatus:
    """The status of the whole model."""
    trainable, total = count(model)
    merged = {layer.merged_adapters for layer in state.layers.values()}
    requires_grad = {}
    devices = {}
    for name in state.configs:
        parameters = list(state.parameters(name))
        requires_grad[name] = _agreed([parameter.requires_grad for parameter in parameters])
        devices[name] = _devices(parameters)
    return ModelStatus(
        base_model_type=type(model).__name__,
        adapter_model_type="PeftModel",
        peft_types={name: str(config.peft_type) for name, config in state.configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(state.layers),
        enabled=state.enabled,
        active_adapters=list(state.active),
        merged_adapters=list(next(iter(merged), ())) if len(merged) < 2 else "irregular",
        requires_grad=requires_grad,
        available_adapters=sorted(state.configs),
        devices=devices,
    )


def _agreed(flags: list[bool]) -> bool | str:
    """The common value of the flags, or "irregular"."""
    return "irregular" if len(set(flags)) > 1 else any(flags)


def _devices(parameters: list[nn.Parameter]) -> list[str]:
    """The names of the devices that hold the parameters, sorted."""
    return sorted({str(parameter.device) for parameter in parameters})
