"""MTL-LoRA: a LoRA that tasks share, with a square matrix and a mixture of several B for each of them.

    y' = y + s (sum_i w_ti B_i) L_t A x,  w_t = softmax(v_t / temperature),  L_t (r, r),  s = lora_alpha / r

Yang et al., 2024, arXiv:2410.09437. Trainable: r in + n r out + n_tasks (r^2 + n) per target, n = n_up_projections. Not
mergeable: rows differ. Starts as a no-op: the B are zero, L_t the identity, and v random, or the B would stay alike. A
call needs `task_ids`, one for each row. PEFT has no such method; the file follows its rules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError
from ..targets.target import Matrix, Target
from .poly import check_tasks, tasks_of


class MTLLoRA(Adapter):
    def __init__(self, config: MTLLoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r, self.n, self.tasks = config.r, config.n_up_projections, config.n_tasks
        self.scaling = config.lora_alpha / self.r
        self.dropout = nn.Dropout(config.lora_dropout)
        self.mtl_lora_A = Matrix(self.r, target.in_features)
        self.mtl_lora_B = nn.Parameter(torch.zeros(self.n, target.out_features, self.r))
        self.mtl_lora_lambda = nn.Parameter(torch.eye(self.r).repeat(self.tasks, 1, 1))
        self.mtl_lora_mixture = nn.Parameter(torch.empty(self.tasks, self.n))
        for factor, fan_in in ((self.mtl_lora_A.weight, target.in_features), (self.mtl_lora_mixture, self.n)):
            nn.init.uniform_(factor, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        if not config.init_weights:
            nn.init.uniform_(self.mtl_lora_B, -1 / math.sqrt(self.r), 1 / math.sqrt(self.r))

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        tasks = tasks_of(self.target, x)
        w = (self.mtl_lora_mixture[tasks] / self.config.temperature).softmax(-1)
        B = torch.einsum("bn,nor->bor", w, self.mtl_lora_B) @ self.mtl_lora_lambda[tasks]
        z = F.linear(self.dropout(x), self.mtl_lora_A.weight)
        return y + torch.einsum("b...r,bor->b...o", z, B * self.scaling)

    def expected_parameters(self) -> int:
        r, n, target = self.r, self.n, self.target
        return r * target.in_features + n * r * target.out_features + self.tasks * (r * r + n)

    def describe(self) -> str:
        return f"r={self.r}, {self.n} up-projections, {self.tasks} tasks"


@dataclass(kw_only=True)
class MTLLoraConfig(LayerConfig):
    r: int = 8
    """Rank of the update."""
    lora_alpha: int | float = 16
    """Strength of the update: it is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the input of the update, in training."""
    n_tasks: int = 1
    """How many tasks there are."""
    n_up_projections: int = 3
    """How many B the tasks share."""
    temperature: float = 0.1
    """Of the softmax that mixes the B: the lower, the more a task keeps to one of them."""
    init_weights: bool = True
    """Start as a no-op; False: the B random too (for tests)."""

    peft_type, adapter, facts = Name("MTL_LORA"), MTLLoRA, ("task_ids",)
    learning_rate = 3e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "n_tasks", "n_up_projections")
        check_range(self, 0, 1, "lora_dropout")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature must be above 0, not {self.temperature}")

    def before(self, shared: nn.Module | None, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        check_tasks(facts, self.n_tasks, model)
