"""accelerate's hooks on modules, which set the device of the computation and load offloaded weights.

The hook is a private attribute, which is the same in accelerate 1.0 to 1.15.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device | None:
    """The device on which accelerate runs a module; None if it has no hook on the module."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return None if device is None else torch.device(device)


@contextmanager
def present(module: nn.Module) -> Iterator[nn.Module]:
    """Keep a module's weights in memory inside the block, even if accelerate has offloaded them."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield module
        return
    hook.pre_forward(module)
    try:
        yield module
    finally:
        hook.post_forward(module, None)
