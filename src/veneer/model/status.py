"""The state of the adapters, read off the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.state import State
from .counting import count


@dataclass(frozen=True)
class LayerStatus:
    """One adapted module."""

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
    """The whole model. "irregular" where its layers do not agree."""

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
    return [_layer(path, layer, state) for path, layer in state.layers.items()]


def _layer(path: str, layer: Any, state: State) -> LayerStatus:
    own = {name: list(adapter.parameters()) for name, adapter in layer.adapters.items()}
    return LayerStatus(
        name=path,
        module_type=type(next(iter(layer.adapters.values()))).__name__,
        enabled=state.enabled,
        active_adapters=[name for name in state.active if name in layer.adapters],
        merged_adapters=list(layer.merged_adapters),
        requires_grad={name: any(p.requires_grad for p in parameters) for name, parameters in own.items()},
        available_adapters=sorted(own),
        devices={name: sorted({str(p.device) for p in parameters}) for name, parameters in own.items()},
    )


def model_status(state: State, model: nn.Module) -> ModelStatus:
    trainable, total = count(model)
    merged = {layer.merged_adapters for layer in state.layers.values()}
    own = {name: list(state.parameters(name)) for name in state.configs}
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
        requires_grad={name: _agreed([p.requires_grad for p in parameters]) for name, parameters in own.items()},
        available_adapters=sorted(state.configs),
        devices={name: sorted({str(p.device) for p in parameters}) for name, parameters in own.items()},
    )


def _agreed(flags: list[bool]) -> bool | str:
    return "irregular" if len(set(flags)) > 1 else any(flags)
