"""The dtypes of half precision, and computing in the dtype of the operands even if autocast would choose another."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def without_autocast(operand: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast is off for the device of `operand`."""
    device = operand.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
