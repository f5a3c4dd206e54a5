"""LoKr: an update that is the Kronecker product of two small matrices, each of which may itself be low-rank.

    W' = W + s (W1 kron W2),  W1 (out1, in1), W2 (out2, in2), out = out1 out2, in = in1 in2, s = alpha / r

Yeh et al., 2023, arXiv:2309.14859. If r is less than half the larger side of W2, W2 = A2 B2 has rank r; with
`decompose_both` the same applies to W1. Trainable: usually out1 in1 + r (out2 + in2) per target. Mergeable. Starts as a
no-op: W1 (or its A1) is zero. `use_effective_conv2d` is FedPara's proposition 3: on convolutions with kernels larger
than 1, A2 and B2 act on the channels only, and a core (r, r, kernel) joins them. As in PEFT's files, if W2 of a Conv1d
is not low-rank, it is the left factor of the product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.adapter import Additive
from ..core.config import LayerConfig, Name, at, check_range, mapping
from ..errors import ConfigError
from ..maths.dropout import row_mask
from ..maths.kronecker import kron_apply, two_factors
from ..targets.target import Target


class Sizes(NamedTuple):
    """The sizes of W1 (out1, in1) and W2 (out2, in2); for a convolution, in2 does not include the kernel."""

    out1: int
    in1: int
    out2: int
    in2: int


class LoKr(Additive):
    kinds = frozenset({"linear", "conv"})

    def __init__(self, config: LoKrConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = at(target.path, config.rank_pattern, config.r)
        self.scaling = at(target.path, config.alpha_pattern, config.alpha) / self.r
        self.kernel = target.kernel
        kernel_size = math.prod(self.kernel)
        in_channels = target.in_features // kernel_size
        out1, out2 = two_factors(target.out_features, config.decompose_factor)
        in1, in2 = two_factors(in_channels, config.decompose_factor)
        self.sizes = Sizes(out1, in1, out2, in2)
        self.is_W1_whole = not config.decompose_both or self.r >= max(out1, in1) / 2
        self.is_W2_whole = self.r >= max(out2, in2) / 2
        self.has_core = config.use_effective_conv2d and kernel_size > 1 and not self.is_W2_whole
        self.initialise(config.init_weights)

    def initialise(self, how: bool | str) -> None:
        """Create the parameters. To start as a no-op, W1 is zero, or W2 with "lycoris"."""
        zeros: tuple[str, ...] = ()
        if how == "lycoris":
            zeros = ("lokr_w2", "lokr_w2_b")
        elif how:
            zeros = ("lokr_w1", "lokr_w1_a")
        for name, shape in self.shapes().items():
            start = torch.empty(shape)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5))
            if name in zeros:
                start.zero_()
            self.register_parameter(name, nn.Parameter(start))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters by name."""
        return self.shapes_of_W1() | self.shapes_of_W2()

    def shapes_of_W1(self) -> dict[str, tuple[int, ...]]:
        out1, in1 = self.sizes.out1, self.sizes.in1
        if self.is_W1_whole:
            return {"lokr_w1": (out1, in1)}
        return {"lokr_w1_a": (out1, self.r), "lokr_w1_b": (self.r, in1)}

    def shapes_of_W2(self) -> dict[str, tuple[int, ...]]:
        r, out2, in2 = self.r, self.sizes.out2, self.sizes.in2
        if self.is_W2_whole:
            return {"lokr_w2": (out2, in2, *self.kernel)}
        if self.has_core:
            ones = (1,) * (2 - len(self.kernel))  # the file stores the core of a Conv1d as that of a Conv2d
            return {"lokr_t2": (r, r, *self.kernel, *ones), "lokr_w2_a": (r, out2), "lokr_w2_b": (r, in2)}
        return {"lokr_w2_a": (out2, r), "lokr_w2_b": (r, in2 * math.prod(self.kernel))}

    def pair(self) -> tuple[Tensor, Tensor]:
        """W1 (out1, in1) times the scaling, and W2 (out2, in2, kernel), or (out2, in2 * kernel) if it is A2 B2."""
        W1 = self.lokr_w1 if self.is_W1_whole else self.lokr_w1_a @ self.lokr_w1_b
        if self.has_core:
            W2 = torch.einsum("ij...,io,jc->oc...", self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        elif self.is_W2_whole:
            W2 = self.lokr_w2
        else:
            W2 = self.lokr_w2_a @ self.lokr_w2_b
        return W1 * self.scaling, W2

    def delta(self) -> Tensor:
        W1, W2 = self.pair()
        if len(self.kernel) == 1 and self.is_W2_whole:
            product = torch.einsum("oi,pjk->pojik", W1, W2)
            return product.reshape(self.target.out_features, -1)
        return torch.kron(W1, W2.flatten(1))

    def term(self, x: Tensor) -> Tensor:
        if self.kernel:
            update = self.target.op(x, self.delta())
        else:
            W1, W2 = self.pair()
            update = kron_apply(W1, W2, x)
        config = self.config
        if self.training and config.rank_dropout + config.module_dropout > 0:
            mask = row_mask(
                self.target.out_features,
                p=config.rank_dropout,
                p_all=config.module_dropout,
                rescale=config.rank_dropout_scale,
                like=update,
            )
            update = update * self.target.channels(mask, update)
        return update

    def expected_parameters(self) -> int:
        return sum(map(math.prod, self.shapes().values()))

    def describe(self) -> str:
        out1, in1, out2, in2 = self.sizes
        return f"r={self.r}, {out1} x {in1} kron {out2} x {in2}"


@dataclass(kw_only=True)
class LoKrConfig(LayerConfig):
    r: int = 8
    """Rank of W2 and, with `decompose_both`, of W1, if they are low-rank."""
    alpha: int | float = 8
    """Strength of the update: it is scaled by alpha / r."""
    rank_dropout: float = 0.0
    """Probability that a row of the update is dropped during training."""
    module_dropout: float = 0.0
    """Probability that the whole update of a target is dropped during training."""
    use_effective_conv2d: bool = False
    """Use fewer parameters on convolutions, by factoring the channels and the kernel separately."""
    decompose_both: bool = False
    """Make W1 low-rank too, if that saves parameters."""
    decompose_factor: int = -1
    """Size of W1. Each of its sides is this number if it divides the target's side; otherwise the largest divisor of
    that side up to this number and up to the side's square root. -1: the largest divisor up to the square root."""
    rank_dropout_scale: bool = False
    """Scale up the other rows to compensate for those that `rank_dropout` drops."""
    rank_pattern: dict[str, int] | None = mapping()
    """Ranks for specific targets, by name ending or regular expression."""
    alpha_pattern: dict[str, int | float] | None = mapping()
    """Values of alpha for specific targets, by name ending or regular expression."""
    init_weights: bool | str = True
    """True: W1 starts at zero. "lycoris": W2 starts at zero, as in LyCORIS. False: both are random (for tests)."""

    peft_type = Name("LOKR")
    adapter = LoKr
    patterns = ("rank_pattern", "alpha_pattern")
    learning_rate = 2e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "rank_pattern")
        check_range(self, 0, 1, "rank_dropout", "module_dropout")
        check_range(self, -1, math.inf, "decompose_factor")
        if self.init_weights not in (True, False, "lycoris"):
            raise ConfigError(f'init_weights {self.init_weights!r} is unknown; use True, False or "lycoris"')
