"""What fast paths ask before they replace a module: whether a call trains it, and what decides what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def takes_part(module: nn.Module) -> bool:
    """Whether a module is called to learn something; not while being compiled, which fuses by itself."""
    return module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def kind_of(module: nn.Module) -> tuple[Any, ...]:
    """What decides what a module without layers computes: its class and its settings."""
    settings = (v for k, v in sorted(vars(module).items()) if isinstance(v, (str, float, int)) and k != "training")
    return type(module), *settings
