"""Activation functions by the names transformers gives them, without transformers: those with nothing to learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F


def identity(x: Tensor) -> Tensor:
    return x


def clipped_gelu(x: Tensor) -> Tensor:
    return F.gelu(x).clamp(-10, 10)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def sqrt_softplus(x: Tensor) -> Tensor:
    return F.softplus(x).sqrt()


def laplace(x: Tensor) -> Tensor:
    """The distribution function of N(sqrt(1/2), 1 / (4 pi)): Mega's bounded stand-in for a squared ReLU."""
    return torch.special.ndtr((x - 0.707107) / 0.282095)


tanh_gelu = partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("gelu", "gelu_python"), F.gelu),
    **dict.fromkeys(("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"), tanh_gelu),
    **dict.fromkeys(("silu", "swish"), F.silu),
    "gelu_10": clipped_gelu,
    "hardswish": F.hardswish,
    "laplace": laplace,
    **dict.fromkeys(("leaky_relu", "leakyrelu"), F.leaky_relu),
    "linear": identity,
    "mish": F.mish,
    "prelu": partial(F.leaky_relu, negative_slope=0.25),  # torch's start; what could be learned is not
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": squared_relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": sqrt_softplus,
    "tanh": torch.tanh,
}
