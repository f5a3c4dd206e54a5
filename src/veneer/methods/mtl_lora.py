"""MTL-LoRA: one LoRA for several tasks, where each task has a square matrix and its own mixture of several B.

    y' = y + s (sum_i w_ti B_i) L_t A x,  w_t = softmax(v_t / temperature),  L_t (r, r),  s = lora_alpha / r

Yang et al., 2024, arXiv:2410.09437. Trainable: r in + n r out + n_tasks (r^2 + n) per target, n = n_up_projections. Not
mergeable: the update depends on the row's task. Starts as a no-op: the B_i are zero and L_t is the identity. v is
random, because equal weights would keep the B_i equal. Each call needs `task_ids`, one for each row. PEFT has no such
method; the file follows PEFT's conventions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapter import Adding
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError
from ..targets.target import Matrix, Target
from .poly import check_tasks, tasks_of


class MTLLoRA(Adding):
    def __init__(self, config: MTLLoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.r
        self.n = config.n_up_projections
        self.tasks = config.n_tasks
        self.scaling = config.lora_alpha / self.r
        self.dropout = nn.Dropout(config.lora_dropout)
        self.mtl_lora_A = Matrix(self.r, target.in_features)
        self.mtl_lora_B = nn.Parameter(torch.zeros(self.n, target.out_features, self.r))
        self.mtl_lora_lambda = nn.Parameter(torch.eye(self.r).repeat(self.tasks, 1, 1))
        self.mtl_lora_mixture = nn.Parameter(torch.empty(self.tasks, self.n))
        uniform_(self.mtl_lora_A.weight, target.in_features)
        uniform_(self.mtl_lora_mixture, self.n)
        if not config.init_weights:
            uniform_(self.mtl_lora_B, self.r)

    def term(self, x: Tensor) -> Tensor:
        tasks = tasks_of(self.target, x)
        logits = self.mtl_lora_mixture[tasks]  # (batch, n)
        w = (logits / self.config.temperature).softmax(-1)
        B = torch.einsum("bn,nor->bor", w, self.mtl_lora_B)
        B = B @ self.mtl_lora_lambda[tasks]
        z = F.linear(self.dropout(x), self.mtl_lora_A.weight)  # (batch, ..., r)
        return torch.einsum("b...r,bor->b...o", z, B * self.scaling)

    def expected_parameters(self) -> int:
        in_features = self.target.in_features
        out_features = self.target.out_features
        shared = self.r * in_features + self.n * self.r * out_features
        per_task = self.r * self.r + self.n
        return shared + self.tasks * per_task

    def describe(self) -> str:
        return f"r={self.r}, {self.n} up-projections, {self.tasks} tasks"


def uniform_(parameter: Tensor, fan_in: int) -> None:
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(parameter, -bound, bound)


@dataclass(kw_only=True)
class MTLLoraConfig(LayerConfig):
    r: int = 8
    """Rank of the update."""
    lora_alpha: int | float = 16
    """Strength of the update: it is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the input of the update during training."""
    n_tasks: int = 1
    """Number of tasks."""
    n_up_projections: int = 3
    """Number of matrices B that the tasks share."""
    temperature: float = 0.1
    """Temperature of the softmax that mixes the B. The lower it is, the closer each task comes to using a single B."""
    init_weights: bool = True
    """Start as a no-op; False: the B are random too (for tests)."""

    peft_type = Name("MTL_LORA")
    adapter = MTLLoRA
    facts = ("task_ids",)
    learning_rate = 3e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "n_tasks", "n_up_projections")
        check_range(self, 0, 1, "lora_dropout")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature must be above 0, not {self.temperature}")

    def before(self, shared: nn.Module | None, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        check_tasks(facts, self.n_tasks, model)
