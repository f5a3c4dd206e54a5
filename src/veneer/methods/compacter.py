"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products with rules that all layers share.

    W = sum_i A_i (x) (s_i t_i),  i = 1..n;  A_i: (n, n), the rule; s_i: (in / n, r), t_i: (r, out / n);  y = x W + b

Karimi Mahabadi et al., 2021, arXiv:2106.04647. Trainable: r (d + m) + m or d for each matrix, and n^3 for the rules.
Not mergeable. Starts as a no-op: the t_i of the last matrix are zero. (The paper starts near the identity, with small
rules.) W is never formed; its factors are applied to x one after the other. m is rounded to a multiple of n.
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
    """The rules A of a sum, (n, n, n): learned as they are, or as products of columns and rows."""

    def __init__(self, config: CompacterConfig) -> None:
        super().__init__()
        n = config.phm_dim
        if config.factorized_phm_rule:
            self.add("phm_rule_left", (n, n, 1), config)
            self.add("phm_rule_right", (n, 1, n), config)
        else:
            self.add("phm_rule", (n, n, n), config)

    def add(self, name: str, shape: tuple[int, int, int], config: CompacterConfig) -> None:
        values = torch.empty(shape).uniform_(-1, 1)
        if config.phm_c_init != "uniform":
            nn.init.normal_(values, std=config.phm_init_range)
        if config.learn_phm:
            self.register_parameter(name, nn.Parameter(values))
        else:
            self.register_buffer(name, values)

    def forward(self) -> Tensor:
        factors = [*self.parameters(), *self.buffers()]
        if len(factors) == 1:
            return factors[0]
        left, right = factors
        return left @ right


class PHM(nn.Module):
    """A linear layer whose matrix is a sum of Kronecker products."""

    def __init__(self, config: CompacterConfig, width: int, size: int, rule: Rule | None, is_zero: bool) -> None:
        super().__init__()
        n = config.phm_dim
        r = config.phm_rank
        self.rule = None if rule else Rule(config)
        self.shared_rule = (rule,)  # a tuple, so that torch does not register it as a child
        self.W_left = nn.Parameter(_xavier(n, width // n, r))
        self.W_right = nn.Parameter(_xavier(n, r, size // n))
        self.b = nn.Parameter(torch.zeros(size))
        if is_zero:
            self.W_right.data *= 0

    def forward(self, x: Tensor) -> Tensor:
        rule = self.rule or self.shared_rule[0]
        A = rule()  # type: ignore[misc]
        blocks = x.unflatten(-1, (len(A), -1))
        inner = torch.einsum("...ab,ibr,iap->...ipr", blocks, self.W_left, A)
        outputs = torch.einsum("...ipr,irq->...pq", inner, self.W_right)
        return outputs.flatten(-2) + self.b


def _xavier(n: int, rows: int, columns: int) -> Tensor:
    """n random matrices from Xavier's uniform initialisation."""
    bound = math.sqrt(6 / (rows + columns))
    return torch.empty(n, rows, columns).uniform_(-1, 1) * bound


class Compacter(Bottleneck):
    def rounded(self, size: float) -> int:
        n = self.config.phm_dim
        return n * max(1, round(size / n))

    def project(self, width: int, size: int, last: bool) -> nn.Module:
        n = self.config.phm_dim
        if self.width % n:
            raise TargetError(f"phm_dim = {n} does not divide {self.width}, the width of {self.target.path!r}")
        is_zero = last and self.config.init_weights is True
        return PHM(self.config, width, size, self.shared, is_zero)

    def expected_parameters(self) -> int:
        config = self.config
        widths = self.width + self.target.out_features
        n = config.phm_dim
        dense = self.size * widths
        factored = config.phm_rank * (widths + 2 * self.size)
        count = super().expected_parameters() - dense + factored
        if config.learn_phm and not config.shared_phm_rule:
            entries = 2 if config.factorized_phm_rule else n
            count += 2 * n**2 * entries
        return count


@dataclass(kw_only=True)
class CompacterConfig(BottleneckConfig):
    placement: str = "houlsby"
    """"houlsby" or "pfeiffer" (Compacter++)."""
    reduction_factor: int | float | None = 32
    """Width of the model divided by the width of the bottleneck."""
    non_linearity: str | None = "gelu"
    """The activation function."""
    phm_dim: int = 4
    """n: number of Kronecker products in the sum, and the size of their rules."""
    phm_rank: int = 1
    """r: rank of the other factor of each product."""
    shared_phm_rule: bool = True
    """Share one set of rules between all layers; False: one set for each matrix."""
    factorized_phm_rule: bool = False
    """Use rules of rank one."""
    learn_phm: bool = True
    """Train the rules."""
    phm_c_init: Literal["normal", "uniform"] = "normal"
    """How the rules start: "normal" or "uniform" between -1 and 1."""
    phm_init_range: float = 0.0001
    """Standard deviation of the normal start."""
    init_weights: bool | Literal["bert", "mam_adapter", "houlsby"] = True
    """True: start as a no-op; anything else: the paper's random start."""

    peft_type = Name("COMPACTER")
    adapter = Compacter
    learning_rate = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "phm_dim", "phm_rank")
        check_range(self, 0, math.inf, "phm_init_range")
        if self.placement == "parallel":
            raise ConfigError(
                "Compacter acts after modules, not in parallel to them: use placement houlsby or pfeiffer"
            )

    def build_shared(self, targets: Sequence[Target]) -> nn.Module | None:
        if not self.shared_phm_rule:
            return None
        return Rule(self)
