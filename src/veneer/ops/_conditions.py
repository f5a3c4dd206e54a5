"""Conditions that fast paths check before they replace the `forward` of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def takes_part(module: nn.Module) -> bool:
    """Whether the module is training with gradients and not being compiled (the compiler fuses operations itself)."""
    return module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def kind_of(module: nn.Module) -> tuple[Any, ...]:
    """A key that identifies what a module without children computes: its class and the values of its settings."""
    settings = []
    for name, value in sorted(vars(module).items()):
        if name != "training" and isinstance(value, (str, float, int)):
            settings.append(value)
    return type(module), *settings
