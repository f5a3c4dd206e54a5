"""Moving an adapter to the device of its targets, in the dtype in which it is trained."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..maths.precision import HALF
from .adapter import Adapter, modules_of
from .state import State


def settle(model: nn.Module, state: State, name: str, *, lift: bool = True) -> None:
    """Move the adapter called `name` to the devices of its targets.

    Args:
        lift: keep the adapter in float32 if the base is in half precision; False: use the dtype of the base.
    """
    for path, adapter in state.adapters(name).items():
        target = state.layers[path].target
        _settle(adapter, target.device, target.dtype, lift)
    first = _first_weight(model)
    if first is None:
        return
    for module in (state.shared.get(name), state.prompts.get(name)):
        if module is not None:
            _settle(module, first.device, first.dtype, lift)


def _first_weight(model: nn.Module) -> Tensor | None:
    """The first floating-point parameter that is not a placeholder; None if there is none."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            return parameter
    return None


def _settle(module: nn.Module, device: torch.device, base_dtype: torch.dtype | None, lift: bool) -> None:
    """Move one module's tensors in place. Placeholder tensors stay as they are until they are loaded."""
    parts = modules_of(module)
    for part in parts:
        for tensor in _tensors(part):
            if not tensor.is_meta and device.type != "meta":
                dtype = _dtype_of(tensor, base_dtype, lift)
                if tensor.device != device or tensor.dtype != dtype:
                    tensor.data = tensor.data.to(device=device, dtype=dtype)
    for part in parts:
        if isinstance(part, Adapter):
            part.forget_dtype()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """The module's own parameters and buffers."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield tensor


def _dtype_of(tensor: Tensor, base_dtype: torch.dtype | None, lift: bool) -> torch.dtype:
    """The dtype for one of an adapter's tensors."""
    if not tensor.is_floating_point():
        return tensor.dtype
    if lift:
        return torch.float32 if tensor.dtype in HALF else tensor.dtype
    return base_dtype if base_dtype in HALF else tensor.dtype
