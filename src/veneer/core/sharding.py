"""Reading and writing parameters that are sharded across processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def whole(t: Tensor) -> Tensor:
    """Gather a sharded tensor from all processes; any other tensor is returned as is. Every process must call this."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


@torch.no_grad()
def write_(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter, sharded or not, to a value that every process holds in full."""
    parameter.copy_(_share(value, parameter))


def _share(value: Any, parameter: Tensor) -> Any:
    if not hasattr(parameter, "full_tensor") or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
