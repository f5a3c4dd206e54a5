"""The functions a small network may have between its layers, by their usual names."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def identity(x: Tensor) -> Tensor:
    return x


def gelu_new(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": gelu_new,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": F.tanh,
    "sigmoid": F.sigmoid,
    "leakyrelu": F.leaky_relu,
    "mish": F.mish,
    "linear": identity,
}
