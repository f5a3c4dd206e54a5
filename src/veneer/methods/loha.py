"""LoHa: an update of rank up to r^2 from four factors, as the Hadamard product of two low-rank matrices.

    W' = W + s (A1 B1) * (A2 B2),  A (out, r), B (r, in), s = alpha / r

Hyeon-Woo et al., 2021 (FedPara), arXiv:2108.06098; for fine-tuning: Yeh et al., 2023, arXiv:2309.14859. Trainable:
2 r (in + out) per target. Mergeable. Starts as a no-op: B2 is zero. `use_effective_conv2d` is FedPara's proposition 3:
on convolutions with kernels larger than 1, A and B act on the channels only, and a core (r, r, kernel) joins them. The
forward pass computes a LoRA of rank r^2 if that is cheaper than the full update. Unlike in PEFT, convolutions keep
their padding mode, and dropping all rows gives zeros instead of NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import LowRank
from ..core.config import LayerConfig, Name, at, check_range, mapping
from ..maths.dropout import row_mask
from ..targets.target import Target


class LoHa(LowRank):
    kinds = frozenset({"linear", "conv"})

    def __init__(self, config: LoHaConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = at(target.path, config.rank_pattern, config.r)
        self.scaling = at(target.path, config.alpha_pattern, config.alpha) / self.r
        self.has_core = config.use_effective_conv2d and math.prod(target.kernel) > 1
        for i in (1, 2):
            self.add_factors(i)
        if config.init_weights:
            nn.init.zeros_(self.hada_w2_b)

    def add_factors(self, i: int) -> None:
        """Create the parameters of the i-th product."""
        r = self.r
        kernel = self.target.kernel
        in_features = self.target.in_features
        out_features = self.target.out_features
        if self.has_core:
            ones = (1,) * (2 - len(kernel))  # the file stores the core of a Conv1d as that of a Conv2d
            self.add_parameter(f"hada_t{i}", r, r, *kernel, *ones)
            self.add_parameter(f"hada_w{i}_a", r, out_features)
            self.add_parameter(f"hada_w{i}_b", r, in_features // math.prod(kernel))
        else:
            self.add_parameter(f"hada_w{i}_a", out_features, r)
            self.add_parameter(f"hada_w{i}_b", r, in_features)

    def add_parameter(self, name: str, *shape: int) -> None:
        start = torch.empty(shape)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5))
        self.register_parameter(name, nn.Parameter(start))

    def pair(self, i: int) -> tuple[Tensor, Tensor]:
        """A (out, r) and B (r, in) of the i-th product."""
        a = getattr(self, f"hada_w{i}_a")
        b = getattr(self, f"hada_w{i}_b")
        if not self.has_core:
            return a, b
        core = getattr(self, f"hada_t{i}")
        B = torch.einsum("ij...,jc->ic...", core, b)  # (r, in channels, kernel)
        return a.T, B.flatten(1)

    def factors(self) -> tuple[Tensor, Tensor]:
        A1, B1 = self.pair(1)
        A2, B2 = self.pair(2)
        rows = (B1[:, None] * B2).flatten(0, 1)  # (r^2, in)
        columns = (A1[:, :, None] * A2[:, None]).flatten(1)  # (out, r^2)
        return rows, columns * self.scaling

    def delta(self) -> Tensor:
        A1, B1 = self.pair(1)
        A2, B2 = self.pair(2)
        return (A1 @ B1) * (A2 @ B2) * self.scaling

    def term(self, x: Tensor) -> Tensor:
        y = self.full_update(x)
        config = self.config
        if not self.training or config.rank_dropout == config.module_dropout == 0:
            return y
        mask = row_mask(
            self.target.out_features,
            p=config.rank_dropout,
            p_all=config.module_dropout,
            rescale=config.rank_dropout > 0,
            like=y,
        )
        return y * self.target.channels(mask, y)

    def full_update(self, x: Tensor) -> Tensor:
        """The update without dropout, computed in the cheaper of two ways."""
        in_features = self.target.in_features
        out_features = self.target.out_features
        is_thin = self.r**2 * (in_features + out_features) < in_features * out_features
        if is_thin and self.target.groups == 1:
            return super().term(x)
        return self.target.op(x, self.delta())

    def expected_parameters(self) -> int:
        in_features = self.target.in_features
        out_features = self.target.out_features
        if not self.has_core:
            return 2 * self.r * (out_features + in_features)
        kernel_size = math.prod(self.target.kernel)
        factors = self.r * (out_features + in_features // kernel_size)
        core = self.r * self.r * kernel_size
        return 2 * (factors + core)

    def describe(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


@dataclass(kw_only=True)
class LoHaConfig(LayerConfig):
    r: int = 8
    """Rank of each of the two products; the update has rank up to r^2."""
    alpha: int | float = 8
    """Strength of the update: it is scaled by alpha / r."""
    rank_dropout: float = 0.0
    """Probability that a row of the update is dropped during training; the other rows are scaled up to compensate."""
    module_dropout: float = 0.0
    """Probability that the whole update of a target is dropped during training."""
    use_effective_conv2d: bool = False
    """Use fewer parameters on convolutions, by factoring the channels and the kernel separately."""
    rank_pattern: dict[str, int] | None = mapping()
    """Ranks for specific targets, by name ending or regular expression."""
    alpha_pattern: dict[str, int | float] | None = mapping()
    """Values of alpha for specific targets, by name ending or regular expression."""
    init_weights: bool = True
    """Start as a no-op; False: random."""

    peft_type = Name("LOHA")
    adapter = LoHa
    patterns = ("rank_pattern", "alpha_pattern")
    learning_rate = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "rank_pattern")
        check_range(self, 0, 1, "rank_dropout", "module_dropout")
