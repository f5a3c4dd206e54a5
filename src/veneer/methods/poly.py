"""Poly: mix a few shared LoRAs (skills) for each row of a batch, with weights learned for each task.

    y' = y + (sum_s w_ts B_s) (sum_s w_ts A_s) x / r,  w_t = sigmoid(Z_t) / sum sigmoid(Z_t)

In training the sigmoids are samples of a relaxed Bernoulli distribution at temperature 1. Ponti et al., 2022,
arXiv:2202.13914. With `n_splits` above 1, each part of the input and output has its own weights (multi-head routing):
Caccia et al., 2022, arXiv:2211.03831. Trainable: n_skills r (in + out) + n_tasks n_splits n_skills per target. Not
mergeable: the update differs between rows. Starts as a no-op: B is zero. Every call needs `task_ids`, one for each row.
Unlike in PEFT, GPT-2's Conv1D can be a target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Adding
from ..core.config import LayerConfig, Name, check_range
from ..errors import TargetError, VeneerError
from ..targets.target import Target


def as_tasks(ids: Any) -> Tensor:
    """`task_ids` as a tensor; raises VeneerError if the call has none."""
    if ids is None:
        raise VeneerError(
            "the adapter needs to know the tasks: give the call (or generate) task_ids, a whole number for each row; "
            "under transformers' Trainer set remove_unused_columns=False, which keeps them"
        )
    return torch.as_tensor(ids)


def check_tasks(facts: dict[Any, Any], n_tasks: int, model: nn.Module) -> None:
    """Check the call's `task_ids` and put them back into `facts` as a tensor on the model's device."""
    ids = as_tasks(facts.get("task_ids"))
    if ids.dim() != 1 or ids.is_floating_point():
        raise VeneerError(f"task_ids must be a vector with a whole number for each row, not {facts['task_ids']!r}")
    if not torch.compiler.is_compiling() and not 0 <= int(ids.min()) <= int(ids.max()) < n_tasks:
        raise VeneerError(f"task_ids {ids.tolist()} must lie between 0 and n_tasks - 1 = {n_tasks - 1}")
    device = next(model.parameters()).device
    facts["task_ids"] = ids.to(device)


def tasks_of(target: Target, x: Tensor) -> Tensor:
    """The task of each row of x."""
    ids = as_tasks(target.fact("task_ids")).to(x.device)
    if len(ids) != len(x):
        raise VeneerError(f"task_ids has {len(ids)} entries, but {target.path!r} was given {len(x)} rows")
    return ids


class Router(nn.Module):
    """One logit for each task, split and skill; starts close to zero."""

    def __init__(self, n_tasks: int, size: int) -> None:
        super().__init__()
        self.module_logits = nn.Parameter(torch.empty(n_tasks, size).uniform_(-1e-3, 1e-3))


class Poly(Adding):
    def __init__(self, config: PolyConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.r
        self.splits = config.n_splits
        self.skills = config.n_skills
        sizes = (target.in_features, target.out_features)
        if any(size % self.splits for size in sizes):
            raise TargetError(f"n_splits = {self.splits} on {target.path!r} must divide its sizes, {sizes}")
        split_in = target.in_features // self.splits
        split_out = target.out_features // self.splits
        bound_A = 1 / math.sqrt(split_in)
        bound_B = 0.0 if config.init_weights else 1 / math.sqrt(self.r)
        A = torch.empty(self.splits, self.skills, split_in, self.r)
        B = torch.empty(self.splits, self.skills, self.r, split_out)
        self.poly_lora_A = nn.Parameter(A.uniform_(-bound_A, bound_A))
        self.poly_lora_B = nn.Parameter(B.uniform_(-bound_B, bound_B))
        self.poly_router = Router(config.n_tasks, self.splits * self.skills)

    def weights(self, tasks: Tensor) -> Tensor:
        """The weight of each skill in each row, (rows, splits, skills)."""
        logits = self.poly_router.module_logits[tasks]
        logits = logits.unflatten(-1, (self.splits, self.skills))
        if self.training:
            noise = torch.rand_like(logits).logit(eps=1e-7)
            logits = logits + noise
        gates = logits.sigmoid()
        total = gates.sum(-1, keepdim=True)
        return gates / (total + 1e-12)

    def term(self, x: Tensor) -> Tensor:
        tasks = tasks_of(self.target, x)
        w = self.weights(tasks)
        A = torch.einsum("bqs,qsir->bqir", w, self.poly_lora_A).flatten(1, 2)  # (rows, in, r)
        B = torch.einsum("bqs,qsro->brqo", w, self.poly_lora_B).flatten(2)  # (rows, r, out)
        narrow = torch.einsum("b...i,bir->b...r", x, A)
        return torch.einsum("b...r,bro->b...o", narrow, B / self.r)

    def expected_parameters(self) -> int:
        sizes = self.target.in_features + self.target.out_features
        loras = self.skills * self.r * sizes
        router = self.config.n_tasks * self.splits * self.skills
        return loras + router

    def describe(self) -> str:
        return f"{self.skills} skills of r={self.r}, {self.config.n_tasks} tasks"


@dataclass(kw_only=True)
class PolyConfig(LayerConfig):
    r: int = 8
    """Rank of each skill."""
    init_weights: bool = True
    """Start as a no-op; False: B is random too (for tests)."""
    poly_type: Literal["poly"] = "poly"
    """The kind of routing: "poly", by task."""
    n_tasks: int = 1
    """Number of tasks."""
    n_skills: int = 4
    """Number of skills (LoRAs) per target, shared by all tasks."""
    n_splits: int = 1
    """Number of parts of the input and output, each with its own mixing weights (multi-head routing)."""

    peft_type = Name("POLY")
    adapter = Poly
    facts = ("task_ids",)
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "n_tasks", "n_skills", "n_splits")

    def before(self, shared: nn.Module | None, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        check_tasks(facts, self.n_tasks, model)
