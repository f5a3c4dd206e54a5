"""C3A: an update made of circulant blocks, each given by its first row.

    W' = W + C / in,  C a grid of blocks C_mn[l, j] = w_mn[(j - l) mod b]

Chen et al., 2024, arXiv:2407.19342. Trainable: in x out / b per target, for a rank of up to min(in, out). Mergeable.
Starts as a no-op with `init_weights=True`; PEFT by default starts at random. Acts on activations by the fast Fourier
transform. Unlike PEFT, a second active adapter reads the layer's input, and the gradient of the input is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Additive
from ..core.config import LayerConfig, Name, at, check_range, mapping
from ..errors import ConfigError
from ..maths.circulant import circulant, circulant_product
from ..targets.target import Target

STARTS = ("gaussian", "kaiming_uniform", "xavier_uniform")


class C3A(Additive):
    def __init__(self, config: C3AConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.block_size = b = at(target.path, config.block_size_pattern, config.block_size)
        for name, size in (("in", target.in_features), ("out", target.out_features)):
            if size % b:
                common = math.gcd(target.in_features, target.out_features)
                raise ConfigError(
                    f"block_size {b} on {target.path!r} must divide its {name} = {size}; the divisors of {common} do"
                )
        self.c3a_kernel = nn.Parameter(torch.zeros(target.out_features // b, target.in_features // b, b))
        if not self.c3a_kernel.is_meta:
            self.initialise(config.init_weights)

    @torch.no_grad()
    def initialise(self, how: bool | str) -> None:
        fan_in, fan_out = self.target.in_features, self.target.out_features
        if how == "gaussian":
            self.c3a_kernel.normal_()
        elif how is not True:
            bound = (1 / fan_in) ** 0.5 if how == "kaiming_uniform" else (6 / (fan_in + fan_out)) ** 0.5
            self.c3a_kernel.uniform_(-bound, bound)

    def kernels(self) -> Tensor:
        return self.c3a_kernel / self.target.in_features

    def delta(self) -> Tensor:
        return circulant(self.kernels())

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + circulant_product(self.kernels(), x)

    def expected_parameters(self) -> int:
        return self.target.in_features * self.target.out_features // self.block_size

    def describe(self) -> str:
        return f"b={self.block_size}"


@dataclass(kw_only=True)
class C3AConfig(LayerConfig):
    block_size: int = 256
    """Size of a block; it divides in and out of every target. Larger means fewer parameters."""
    block_size_pattern: dict[str, int] | None = mapping()
    """Other sizes for some targets, by name ending or regular expression."""
    init_weights: bool | str = "xavier_uniform"
    """True: zero, a no-op. "gaussian", "kaiming_uniform", "xavier_uniform" (also False): random."""

    peft_type, adapter = Name("C3A"), C3A
    patterns = ("block_size_pattern",)
    learning_rate = 1e-1
    recommended = {"init_weights": True, "block_size": 64}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "block_size", "block_size_pattern")
        if isinstance(self.init_weights, str) and self.init_weights not in STARTS:
            raise ConfigError(f"init_weights {self.init_weights!r}: use True, False or one of {', '.join(STARTS)}")
