"""C3A: an update made of circulant blocks, each given by its first row.

    W' = W + C / in,  C a grid of blocks C_mn[l, j] = w_mn[(j - l) mod b]

Chen et al., 2024, arXiv:2407.19342. Trainable: in x out / b per target, for a rank of up to min(in, out). Mergeable.
Starts as a no-op with `init_weights=True`; the default, as in PEFT, is a random start. Activations are multiplied by
the blocks with the fast Fourier transform. Unlike in PEFT, a second active adapter reads the layer's input, not the
first adapter's output, and the gradient of the input is exact.
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
        b = at(target.path, config.block_size_pattern, config.block_size)
        self.block_size = b
        self.check_size("in", target.in_features)
        self.check_size("out", target.out_features)
        kernels = torch.zeros(target.out_features // b, target.in_features // b, b)
        self.c3a_kernel = nn.Parameter(kernels)
        if not self.c3a_kernel.is_meta:
            self.initialise(config.init_weights)

    def check_size(self, name: str, size: int) -> None:
        if size % self.block_size:
            target = self.target
            common = math.gcd(target.in_features, target.out_features)
            raise ConfigError(
                f"block_size {self.block_size} on {target.path!r} must divide its {name} = {size}; "
                f"the divisors of {common} do"
            )

    @torch.no_grad()
    def initialise(self, start: bool | str) -> None:
        if start is True:
            return
        if start == "gaussian":
            self.c3a_kernel.normal_()
            return
        fan_in = self.target.in_features
        fan_out = self.target.out_features
        bound = (1 / fan_in) ** 0.5 if start == "kaiming_uniform" else (6 / (fan_in + fan_out)) ** 0.5
        self.c3a_kernel.uniform_(-bound, bound)

    def kernels(self) -> Tensor:
        return self.c3a_kernel / self.target.in_features

    def delta(self) -> Tensor:
        return circulant(self.kernels())

    def term(self, x: Tensor) -> Tensor:
        return circulant_product(self.kernels(), x)

    def expected_parameters(self) -> int:
        return self.target.in_features * self.target.out_features // self.block_size

    def describe(self) -> str:
        return f"b={self.block_size}"


@dataclass(kw_only=True)
class C3AConfig(LayerConfig):
    block_size: int = 256
    """Size b of a block; must divide both sizes of every target. Larger blocks mean fewer parameters."""
    block_size_pattern: dict[str, int] | None = mapping()
    """Block sizes for specific targets, by name ending or regular expression."""
    init_weights: bool | str = "xavier_uniform"
    """True: start at zero, as a no-op. "gaussian", "kaiming_uniform", "xavier_uniform": random; False: as the last."""

    peft_type = Name("C3A")
    adapter = C3A
    patterns = ("block_size_pattern",)
    learning_rate = 1e-1
    recommended = {"init_weights": True, "block_size": 64}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "block_size", "block_size_pattern")
        if isinstance(self.init_weights, str) and self.init_weights not in STARTS:
            raise ConfigError(f"init_weights {self.init_weights!r}: use True, False or one of {', '.join(STARTS)}")
