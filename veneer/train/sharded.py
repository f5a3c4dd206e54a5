"""Parameters that FSDP has sharded: read whole, and written whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def whole(t: Tensor) -> Tensor:
    """A tensor gathered from all processes; itself where it is not sharded. Every process must take part."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


@torch.no_grad()
def write_(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter to a whole value that every process has."""
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
