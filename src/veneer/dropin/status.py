"""PEFT's report on the layers and the model: what is on, active, merged, learning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..errors import VeneerError
from ..model.peft_model import PeftModel
from .layers import PeftLayer


@dataclass
class TunerLayerStatus:
    """One adapted module."""

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
    """The whole model; "irregular" where its layers do not agree."""

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
    """The state of each adapted module of any model."""
    root = model.base_model if isinstance(model, PeftModel) else model
    _check_kind(model, "get_layer_status")
    found = [_layer(name, m) for name, m in root.named_modules() if isinstance(m, PeftLayer)]
    if not found:
        raise VeneerError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters "
            "injected in the model."
        )
    return found


def _check_kind(model: nn.Module, asked: str) -> None:
    kind = getattr(getattr(model, "peft_type", None), "value", None) if isinstance(model, PeftModel) else None
    if kind == "ADAPTION_PROMPT" or getattr(model, "_is_prompt_learning", False):
        raise TypeError(
            f"{asked}() got an invalid PeftModel instance; prefix tuning and adaption prompt are not supported."
        )


def _layer(name: str, layer: PeftLayer) -> TunerLayerStatus:
    learned = {n: list(layer.learned(n)) for n in layer.adapters}
    own = {n: [*adapter.parameters(), *adapter.buffers()] for n, adapter in layer.adapters.items()}
    return TunerLayerStatus(
        name=name,
        module_type=layer._get_name(),
        enabled=not layer.disable_adapters,
        active_adapters=layer.active_adapters,
        merged_adapters=layer.merged_adapters,
        requires_grad={n: agreed(p.requires_grad for p in parameters) for n, parameters in learned.items()},
        available_adapters=sorted(layer._get_available_adapters()),
        devices={n: sorted({t.device.type for t in tensors}) for n, tensors in own.items()},
        quantization_backend=None,
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of the adapters of any model."""
    _check_kind(model, "get_model_status")
    layers = get_layer_status(model)
    is_peft = isinstance(model, PeftModel)
    base = model.get_base_model() if is_peft else model
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    names = sorted({n for layer in layers for n in layer.available_adapters})
    flags = {n: [layer.requires_grad[n] for layer in layers if n in layer.requires_grad] for n in names}
    return TunerModelStatus(
        base_model_type=type(base).__name__ if is_peft or hasattr(model, "config") else "other",
        adapter_model_type=type(model.base_model).__name__ if is_peft else "None",
        peft_types={n: c.peft_type.value for n, c in model.peft_config.items()} if is_peft else {},  # type: ignore[union-attr, operator]
        trainable_params=sum(size for size, learns in parameters if learns),
        total_params=sum(size for size, _ in parameters),
        num_adapter_layers=len(layers),
        enabled=agreed(layer.enabled for layer in layers),
        active_adapters=_active(layers),
        merged_adapters=_merged(layers),
        requires_grad={n: agreed(found) for n, found in flags.items()},
        available_adapters=names,
        devices={n: sorted({d for layer in layers for d in layer.devices.get(n, ())}) for n in names},
        quantization_backend=None,
    )


def agreed(flags: Iterable[bool | str]) -> bool | str:
    found = set(flags)
    if found <= {True}:
        return True
    return False if found == {False} else "irregular"


def _active(layers: list[TunerLayerStatus]) -> list[str] | str:
    found = {tuple(layer.active_adapters) for layer in layers}
    return list(found.pop()) if len(found) == 1 else "irregular"


def _merged(layers: list[TunerLayerStatus]) -> list[str] | str:
    merged = {n for layer in layers for n in layer.merged_adapters}
    partly = any(set(layer.available_adapters) - set(layer.merged_adapters) & merged for layer in layers)
    unmerged = any((set(x.available_adapters) - set(x.merged_adapters)) & merged for x in layers)
    return "irregular" if partly and unmerged else sorted(merged)
