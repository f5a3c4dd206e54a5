"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products with rules that all layers share.

    W = sum_i A_i (x) (s_i t_i),  i = 1..n;  A_i: (n, n), the rule; s_i: (in / n, r), t_i: (r, out / n);  y = x W + b

Karimi Mahabadi et al., 2021, arXiv:2106.04647. Trainable: r (d + m) + m or d for each matrix, and n^3 for the rules.
Not mergeable. Starts as a no-op, the last t_i are zero (the paper starts near the identity by small rules). W is never
made: the products act on x. m is rounded to a multiple of n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.config import Name, check_range
from ..errors import ConfigError, TargetError
from ..targets.target import Target
from .bottleneck import BottleneckConfig
from .families.bottleneck import Bottleneck


class Rule(nn.Module):
    """A: (n, n, n), perhaps as products of columns and rows."""

    def __init__(self, config: CompacterConfig) -> None:
        super().__init__()
        n = config.phm_dim
        shapes = {"phm_rule_left": (n, n, 1), "phm_rule_right": (n, 1, n)}
        for name, shape in (shapes if config.factorized_phm_rule else {"phm_rule": (n, n, n)}).items():
            values = torch.empty(shape).uniform_(-1, 1)
            values = values if config.phm_c_init == "uniform" else nn.init.normal_(values, std=config.phm_init_range)
            if config.learn_phm:
                self.register_parameter(name, nn.Parameter(values))
            else:
                self.register_buffer(name, values)

    def forward(self) -> Tensor:
        parts = [*self.parameters(), *self.buffers()]
        return parts[0] @ parts[1] if parts[1:] else parts[0]


class PHM(nn.Module):
    """One matrix of an adapter."""

    def __init__(self, config: CompacterConfig, width: int, size: int, rule: Rule | None, is_zero: bool) -> None:
        super().__init__()
        n, r = config.phm_dim, config.phm_rank
        self.rule, self.shared_rule = None if rule else Rule(config), (rule,)
        self.W_left, self.W_right = (
            nn.Parameter(torch.empty(n, rows, columns).uniform_(-1, 1) * math.sqrt(6 / (rows + columns)))
            for rows, columns in ((width // n, r), (r, size // n))
        )
        self.b = nn.Parameter(torch.zeros(size))
        self.W_right.data *= not is_zero

    def forward(self, x: Tensor) -> Tensor:
        A = (self.rule or self.shared_rule[0])()  # type: ignore[misc]
        seen = torch.einsum("...ab,ibr,iap->...ipr", x.unflatten(-1, (len(A), -1)), self.W_left, A)
        return torch.einsum("...ipr,irq->...pq", seen, self.W_right).flatten(-2) + self.b


class Compacter(Bottleneck):
    def rounded(self, size: float) -> int:
        return self.config.phm_dim * max(1, round(size / self.config.phm_dim))

    def project(self, width: int, size: int, last: bool) -> nn.Module:
        n, path = self.config.phm_dim, self.target.path
        if self.width % n:
            raise TargetError(f"phm_dim = {n} does not divide {self.width}, the width of {path!r}")
        return PHM(self.config, width, size, self.shared, last and self.config.init_weights is True)

    def expected_parameters(self) -> int:
        config, d, out = self.config, self.width, self.target.out_features
        own = config.phm_dim**2 * (2 if config.factorized_phm_rule else config.phm_dim)
        fewer = self.size * (d + out) - config.phm_rank * (d + 2 * self.size + out)
        return super().expected_parameters() - fewer + 2 * own * (config.learn_phm and not config.shared_phm_rule)


@dataclass(kw_only=True)
class CompacterConfig(BottleneckConfig):
    placement: str = "houlsby"
    """"houlsby" or "pfeiffer" (Compacter++)."""
    reduction_factor: int | float | None = 32
    """Width of the model over that of the bottleneck."""
    non_linearity: str | None = "gelu"
    """f."""
    phm_dim: int = 4
    """n: how many Kronecker products, and the size of their rules."""
    phm_rank: int = 1
    """r: rank of their other factors."""
    shared_phm_rule: bool = True
    """One set of rules for all layers, instead of one for each matrix."""
    factorized_phm_rule: bool = False
    """Rules of rank one."""
    learn_phm: bool = True
    """Train the rules."""
    phm_c_init: Literal["normal", "uniform"] = "normal"
    """How the rules start: "normal" or "uniform" between -1 and 1."""
    phm_init_range: float = 0.0001
    """Standard deviation of a normal start."""
    init_weights: bool | Literal["bert", "mam_adapter", "houlsby"] = True
    """True: a no-op; anything else: the paper's random start."""

    peft_type, adapter = Name("COMPACTER"), Compacter
    learning_rate = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "phm_dim", "phm_rank")
        check_range(self, 0, math.inf, "phm_init_range")

        if self.placement == "parallel":
            raise ConfigError("Compacter stands behind modules, not beside them: placement houlsby or pfeiffer")

    def build_shared(self, targets: Sequence[Target]) -> nn.Module | None:
        return Rule(self) if self.shared_phm_rule else None
