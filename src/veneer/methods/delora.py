"""DeLoRA: a low-rank update whose directions have unit length and whose strength is a learned bound.

    W' = W + lambda / r B D A diag(n),  D_ii = 1 / (|A_i| |B^i|),  n the norms of W's columns at the start

A_i are the rows of A, B^i the columns of B. Without n, the update's Frobenius norm is at most lambda. Bini
et al., 2025, arXiv:2503.18225. Trainable: r (in + out) + 1 per target. Mergeable. Starts as a no-op: B is zero. As in
PEFT, n has one entry per input, norms below 1e-4 count as 1e-4, and `module_dropout` drops entries of the input. Unlike
in PEFT, GPT-2's Conv1D can be a target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import LowRank
from ..core.config import LayerConfig, Name, at, check_range, mapping
from ..targets.target import Target

SHORTEST = 1e-4
"""Lower bound of the norms that directions are divided by."""


class DeLoRA(LowRank):
    def __init__(self, config: DeloraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = at(target.path, config.rank_pattern, config.r)
        bound = at(target.path, config.lambda_pattern, config.delora_lambda)
        self.delora_A = nn.Parameter(torch.empty(self.r, target.in_features))
        self.delora_B = nn.Parameter(torch.zeros(target.out_features, self.r))
        self.delora_lambda = nn.Parameter(torch.full((1,), float(bound)))
        W = target.original_weight().detach().float()
        self.register_buffer("delora_w_norm", W.norm(dim=0))
        nn.init.kaiming_uniform_(self.delora_A, a=math.sqrt(5))
        if not config.init_weights:
            nn.init.kaiming_uniform_(self.delora_B, a=math.sqrt(5))
        self.set_dropout(config.module_dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        A = self.delora_A
        B = self.delora_B
        lengths_A = A.norm(dim=1).clamp_min(SHORTEST)
        lengths_B = B.norm(dim=0).clamp_min(SHORTEST)
        strengths = self.delora_lambda / self.r / (lengths_A * lengths_B)
        A = A * self.delora_w_norm.to(A)
        B = B * strengths
        return A, B

    def expected_parameters(self) -> int:
        return self.r * (self.target.in_features + self.target.out_features) + 1

    def describe(self) -> str:
        return f"r={self.r}, {self.target.in_features} -> {self.target.out_features}"


@dataclass(kw_only=True)
class DeloraConfig(LayerConfig):
    r: int = 8
    """Rank of the update."""
    delora_lambda: int | float = 15
    """Initial value of lambda, the learned bound on the size of the update."""
    module_dropout: float = 0.0
    """Dropout on the input of the update during training."""
    init_weights: bool = True
    """Start as a no-op; False: B starts at random too (for tests)."""
    rank_pattern: dict[str, int] | None = mapping()
    """Ranks for specific targets, by name ending or regular expression."""
    lambda_pattern: dict[str, int | float] | None = mapping()
    """Initial values of lambda for specific targets, by name ending or regular expression."""

    peft_type = Name("DELORA")
    adapter = DeLoRA
    patterns = ("rank_pattern", "lambda_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "rank_pattern")
        check_range(self, 0, 1, "module_dropout")
