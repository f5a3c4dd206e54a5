"""Activation functions without parameters, by the names that transformers uses."""

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
    """The distribution function of N(sqrt(1/2), 1 / (4 pi)): Mega's bounded approximation of a squared ReLU."""
    return torch.special.ndtr((x - 0.707107) / 0.282095)


tanh_gelu = partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_accurate": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "gelu_new": tanh_gelu,
    "gelu_python_tanh": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "silu": F.silu,
    "swish": F.silu,
    "gelu_10": clipped_gelu,
    "hardswish": F.hardswish,
    "laplace": laplace,
    "leaky_relu": F.leaky_relu,
    "leakyrelu": F.leaky_relu,
    "linear": identity,
    "mish": F.mish,
    "prelu": partial(F.leaky_relu, negative_slope=0.25),  # torch's initial slope, not learned
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": squared_relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": sqrt_softplus,
    "tanh": torch.tanh,
}
