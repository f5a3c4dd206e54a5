"""Poly: a few LoRA skills, mixed for each row of a batch by weights that its task learns.

    y' = y + (sum_s w_ts B_s) (sum_s w_ts A_s) x / r,  w_t = sigmoid(Z_t) / sum sigmoid(Z_t)

In training the sigmoids are samples of a relaxed Bernoulli at temperature 1. Ponti et al., 2022, arXiv:2202.13914;
`n_splits` above 1 mixes each part of the input and output apart, as multi-head routing does: Caccia et al., 2022,
arXiv:2211.03831. Trainable: n_skills r (in + out) + n_tasks n_splits n_skills per target. Not mergeable: rows differ.
Starts as a no-op: B is zero. A call needs `task_ids`, one for each row. Unlike in PEFT, GPT-2's Conv1D is a target too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name, check_range
from ..errors import TargetError, VeneerError
from ..targets.target import Target


def as_tasks(ids: Any) -> Tensor:
    if ids is None:
        raise VeneerError(
            "the adapter needs to know the tasks: give the call (or generate) task_ids, a whole number for each row; "
            "under transformers' Trainer set remove_unused_columns=False, which keeps them"
        )
    return torch.as_tensor(ids)


def check_tasks(facts: dict[Any, Any], n_tasks: int, model: nn.Module) -> None:
    """Make the call's `task_ids` a vector of whole numbers below n_tasks, where the model computes."""
    ids = as_tasks(facts.get("task_ids"))
    if ids.dim() != 1 or ids.is_floating_point():
        raise VeneerError(f"task_ids must be a vector with a whole number for each row, not {facts['task_ids']!r}")
    if not torch.compiler.is_compiling() and not 0 <= int(ids.min()) <= int(ids.max()) < n_tasks:
        raise VeneerError(f"task_ids {ids.tolist()} must lie between 0 and n_tasks - 1 = {n_tasks - 1}")
    facts["task_ids"] = ids.to(next(model.parameters()).device)


def tasks_of(target: Target, x: Tensor) -> Tensor:
    """The tasks of the rows of x."""
    ids = as_tasks(target.fact("task_ids")).to(x.device)
    if len(ids) != len(x):
        raise VeneerError(f"task_ids has {len(ids)} entries, but {target.path!r} was given {len(x)} rows")
    return ids


class Router(nn.Module):
    """One logit for each task, split and skill, drawn close to zero."""

    def __init__(self, n_tasks: int, size: int) -> None:
        super().__init__()
        self.module_logits = nn.Parameter(torch.empty(n_tasks, size).uniform_(-1e-3, 1e-3))


class Poly(Adapter):
    def __init__(self, config: PolyConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r, self.splits, self.skills = config.r, config.n_splits, config.n_skills
        sizes = target.in_features, target.out_features
        if any(size % self.splits for size in sizes):
            raise TargetError(f"n_splits = {self.splits} on {target.path!r} must divide its sizes, {sizes}")
        width, height = (size // self.splits for size in sizes)
        a, b = 1 / math.sqrt(width), 0.0 if config.init_weights else 1 / math.sqrt(self.r)
        self.poly_lora_A = nn.Parameter(torch.empty(self.splits, self.skills, width, self.r).uniform_(-a, a))
        self.poly_lora_B = nn.Parameter(torch.empty(self.splits, self.skills, self.r, height).uniform_(-b, b))
        self.poly_router = Router(config.n_tasks, self.splits * self.skills)

    def weights(self, tasks: Tensor) -> Tensor:
        """What each row takes of each skill, (rows, splits, skills)."""
        logits = self.poly_router.module_logits[tasks].unflatten(-1, (self.splits, self.skills))
        if self.training:
            logits = logits + torch.rand_like(logits).logit(eps=1e-7)
        chosen = logits.sigmoid()
        return chosen / (chosen.sum(-1, keepdim=True) + 1e-12)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        w = self.weights(tasks_of(self.target, x))
        A = torch.einsum("bqs,qsir->bqir", w, self.poly_lora_A).flatten(1, 2)
        B = torch.einsum("bqs,qsro->brqo", w, self.poly_lora_B).flatten(2)
        return y + torch.einsum("b...r,bro->b...o", torch.einsum("b...i,bir->b...r", x, A), B / self.r)

    def expected_parameters(self) -> int:
        lora = self.skills * self.r * (self.target.in_features + self.target.out_features)
        return lora + self.config.n_tasks * self.splits * self.skills

    def describe(self) -> str:
        return f"{self.skills} skills of r={self.r}, {self.config.n_tasks} tasks"


@dataclass(kw_only=True)
class PolyConfig(LayerConfig):
    r: int = 8
    """Rank of a skill."""
    init_weights: bool = True
    """Start as a no-op; False: B random too (for tests)."""
    poly_type: Literal["poly"] = "poly"
    """The kind of routing: "poly", by task."""
    n_tasks: int = 1
    """How many tasks there are."""
    n_skills: int = 4
    """How many LoRA skills a target has, shared by the tasks."""
    n_splits: int = 1
    """Parts of input and output that are mixed apart (multi-head routing)."""

    peft_type, adapter, facts = Name("POLY"), Poly, ("task_ids",)
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "n_tasks", "n_skills", "n_splits")

    def before(self, shared: nn.Module | None, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        check_tasks(facts, self.n_tasks, model)
