"""LoKr: an update that is the Kronecker product of two small matrices, each of which may itself be low-rank.

    W' = W + s (W1 kron W2),  W1 (out1, in1), W2 (out2, in2), out = out1 out2, in = in1 in2, s = alpha / r

Yeh et al., 2023, arXiv:2309.14859. W2 = A2 B2 of rank r where r is less than half its larger side, and W1 likewise if
`decompose_both`. Trainable: mostly out1 in1 + r (out2 + in2) per target. Mergeable. Starts as a no-op: W1 (or its A1)
is zero. `use_effective_conv2d` is FedPara's proposition 3: on kernels larger than 1, A2 and B2 span the channels alone
and a core (r, r, kernel) joins them. As in PEFT's files, a whole W2 of a Conv1d stands on the product's left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Additive
from ..core.config import LayerConfig, Name, at, check_range, mapping
from ..errors import ConfigError
from ..maths.dropout import row_mask
from ..maths.kronecker import kron_apply, two_factors
from ..targets.target import Target


class LoKr(Additive):
    kinds = frozenset({"linear", "conv"})

    def __init__(self, config: LoKrConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = r = at(target.path, config.rank_pattern, config.r)
        self.scaling = at(target.path, config.alpha_pattern, config.alpha) / r
        self.kernel = target.kernel
        out1, out2 = two_factors(target.out_features, config.decompose_factor)
        in1, in2 = two_factors(target.in_features // math.prod(self.kernel), config.decompose_factor)
        self.sizes = out1, in1, out2, in2
        self.is_whole = not config.decompose_both or r >= max(out1, in1) / 2, r >= max(out2, in2) / 2
        self.has_core = config.use_effective_conv2d and math.prod(self.kernel) > 1 and not self.is_whole[1]
        zero = {True: ("w1", "w1_a"), "lycoris": ("w2", "w2_b"), False: ()}[config.init_weights]
        for name, shape in self.shapes().items():
            start = nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))
            setattr(self, f"lokr_{name}", nn.Parameter(start * (name not in zero)))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What is learned, by the name it has in the file after `lokr_`."""
        (out1, in1, out2, in2), r = self.sizes, self.r
        one = {"w1": (out1, in1)} if self.is_whole[0] else {"w1_a": (out1, r), "w1_b": (r, in1)}
        if self.is_whole[1]:
            return one | {"w2": (out2, in2, *self.kernel)}
        if self.has_core:
            core = (*self.kernel, *(1,) * (2 - len(self.kernel)))  # the file keeps Conv1d's as that of a Conv2d
            return one | {"t2": (r, r, *core), "w2_a": (r, out2), "w2_b": (r, in2)}
        return one | {"w2_a": (out2, r), "w2_b": (r, in2 * math.prod(self.kernel))}

    def pair(self) -> tuple[Tensor, Tensor]:
        """W1 (out1, in1) with the scaling, and W2 (out2, in2, kernel), its last two sizes in one if it was low-rank."""
        W1 = self.lokr_w1 if self.is_whole[0] else self.lokr_w1_a @ self.lokr_w1_b
        if self.has_core:
            W2 = torch.einsum("ij...,io,jc->oc...", self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        else:
            W2 = self.lokr_w2 if self.is_whole[1] else self.lokr_w2_a @ self.lokr_w2_b
        return W1 * self.scaling, W2

    def delta(self) -> Tensor:
        W1, W2 = self.pair()
        if len(self.kernel) == 1 and self.is_whole[1]:
            return torch.einsum("oi,pjk->pojik", W1, W2).reshape(self.target.out_features, -1)
        return torch.kron(W1, W2.flatten(1))

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        update = self.target.op(x, self.delta()) if self.kernel else kron_apply(*self.pair(), x)
        rows, everything = self.config.rank_dropout, self.config.module_dropout
        if self.training and rows + everything > 0:
            mask = row_mask(self.target.out_features, rows, everything, self.config.rank_dropout_scale, y)
            update = update * self.target.channels(mask, y)
        return y + update

    def expected_parameters(self) -> int:
        return sum(map(math.prod, self.shapes().values()))

    def describe(self) -> str:
        return "r={}, {} x {} kron {} x {}".format(self.r, *self.sizes)


@dataclass(kw_only=True)
class LoKrConfig(LayerConfig):
    r: int = 8
    """Rank of the matrices that are low-rank."""
    alpha: int | float = 8
    """Strength of the update: it is scaled by alpha / r."""
    rank_dropout: float = 0.0
    """In training, the share of the update's rows left out."""
    module_dropout: float = 0.0
    """In training, how often a target's update is left out whole."""
    use_effective_conv2d: bool = False
    """Fewer parameters on convolutions: channels and kernel apart."""
    decompose_both: bool = False
    """Make W1 low-rank too, where that saves something."""
    decompose_factor: int = -1
    """Size of W1: each of its sides is this, or the largest divisor up to it. -1: near the root of the target's."""
    rank_dropout_scale: bool = False
    """Let the rows that stay grow to make up for those that `rank_dropout` leaves out."""
    rank_pattern: dict[str, int] | None = mapping()
    """Other ranks for some targets, by name ending or regular expression."""
    alpha_pattern: dict[str, int | float] | None = mapping()
    """Other values of alpha, likewise."""
    init_weights: bool | str = True
    """True: W1 starts at zero. "lycoris": W2 does, as in LyCORIS. False: neither (for tests)."""

    peft_type, adapter = Name("LOKR"), LoKr
    patterns, learning_rate = ("rank_pattern", "alpha_pattern"), 2e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "rank_pattern")
        check_range(self, 0, 1, "rank_dropout", "module_dropout")
        check_range(self, -1, math.inf, "decompose_factor")
        if self.init_weights not in (True, False, "lycoris"):
            raise ConfigError(f'init_weights {self.init_weights!r} is unknown; use True, False or "lycoris"')
