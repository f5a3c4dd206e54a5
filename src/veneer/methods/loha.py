"""LoHa: an update of rank r^2 from four factors, the Hadamard product of two low-rank matrices.

    W' = W + s (A1 B1) * (A2 B2),  A (out, r), B (r, in), s = alpha / r

Hyeon-Woo et al., 2021 (FedPara), arXiv:2108.06098; for fine-tuning: Yeh et al., 2023, arXiv:2309.14859. Trainable:
2 r (in + out) per target. Mergeable. Starts as a no-op: B2 is zero. `use_effective_conv2d` is FedPara's proposition 3:
on kernels larger than 1, A and B span the channels alone and a core (r, r, kernel) joins them. On activations it is a
LoRA of rank r^2 where that is cheaper. Unlike PEFT, padding modes count, and dropping every row gives no NaN.
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
        self.r = r = at(target.path, config.rank_pattern, config.r)
        self.scaling = at(target.path, config.alpha_pattern, config.alpha) / r
        kernel = target.kernel
        self.has_core = config.use_effective_conv2d and math.prod(kernel) > 1
        out_features, in_features = target.out_features, target.in_features
        for i in (1, 2):
            if self.has_core:
                core = (*kernel, *(1,) * (2 - len(kernel)))  # the file keeps Conv1d's as that of a Conv2d
                self.learn(f"hada_t{i}", r, r, *core)
                self.learn(f"hada_w{i}_a", r, out_features)
                self.learn(f"hada_w{i}_b", r, in_features // math.prod(kernel))
            else:
                self.learn(f"hada_w{i}_a", out_features, r)
                self.learn(f"hada_w{i}_b", r, in_features)
        if config.init_weights:
            nn.init.zeros_(self.hada_w2_b)

    def learn(self, name: str, *shape: int) -> None:
        setattr(self, name, nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))))

    def pair(self, i: int) -> tuple[Tensor, Tensor]:
        """A (out, r) and B (r, in) of one of the two products."""
        a, b = getattr(self, f"hada_w{i}_a"), getattr(self, f"hada_w{i}_b")
        if not self.has_core:
            return a, b
        return a.T, torch.einsum("ij...,jc->ic...", getattr(self, f"hada_t{i}"), b).flatten(1)

    def factors(self) -> tuple[Tensor, Tensor]:
        (A1, B1), (A2, B2) = self.pair(1), self.pair(2)
        rows = (B1[:, None] * B2).flatten(0, 1)  # (r^2, in)
        columns = (A1[:, :, None] * A2[:, None]).flatten(1)  # (out, r^2)
        return rows, columns * self.scaling

    def delta(self) -> Tensor:
        (A1, B1), (A2, B2) = self.pair(1), self.pair(2)
        return (A1 @ B1) * (A2 @ B2) * self.scaling

    def update(self, x: Tensor) -> Tensor:
        target, config = self.target, self.config
        is_thin = self.r**2 * (target.in_features + target.out_features) < target.in_features * target.out_features
        y = super().update(x) if is_thin and target.groups == 1 else target.op(x, self.delta())
        if not self.training or config.rank_dropout == config.module_dropout == 0:
            return y
        mask = row_mask(target.out_features, config.rank_dropout, config.module_dropout, config.rank_dropout > 0, y)
        return y * target.channels(mask, y)

    def expected_parameters(self) -> int:
        r, target = self.r, self.target
        kernel = math.prod(target.kernel) if self.has_core else 1
        return 2 * (r * (target.out_features + target.in_features // kernel) + (r * r * kernel if self.has_core else 0))

    def describe(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


@dataclass(kw_only=True)
class LoHaConfig(LayerConfig):
    r: int = 8
    """Rank of each product; that of the update is up to r^2."""
    alpha: int | float = 8
    """Strength of the update: it is scaled by alpha / r."""
    rank_dropout: float = 0.0
    """In training, the share of the update's rows left out; the others grow to make up for it."""
    module_dropout: float = 0.0
    """In training, how often a target's update is left out whole."""
    use_effective_conv2d: bool = False
    """Fewer parameters on convolutions: channels and kernel apart."""
    rank_pattern: dict[str, int] | None = mapping()
    """Other ranks for some targets, by name ending or regular expression."""
    alpha_pattern: dict[str, int | float] | None = mapping()
    """Other values of alpha, likewise."""
    init_weights: bool = True
    """Start as a no-op; False: random."""

    peft_type, adapter = Name("LOHA"), LoHa
    patterns, learning_rate = ("rank_pattern", "alpha_pattern"), 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "rank_pattern")
        check_range(self, 0, 1, "rank_dropout", "module_dropout")
