"""accelerate's hooks on single modules: where one computes, and its weights in memory while they are needed.

The hook is a private attribute, the same in accelerate 1.0 to 1.15.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate makes a module compute; None where it has no hook on it."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return None if device is None else torch.device(device)


@contextmanager
def present(module: nn.Module) -> Iterator[nn.Module]:
    """Inside, the module has its weights in memory, also where accelerate has offloaded them."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield module
        return
    hook.pre_forward(module)
    try:
        yield module
    finally:
        hook.post_forward(module, None)
