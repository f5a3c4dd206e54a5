"""AdaLoRA: learn the update in the form of an SVD, and give a higher rank to the targets that need it.

    W' = W + s B diag(E) A,  s = alpha / init_r,  |A A^T - I|, |B^T B - I| small

Zhang et al., 2023, arXiv:2303.10512. Each triplet (a row of A, an entry of E, a column of B) has an importance score
(eq. 8-10). After step `tinit` the least important triplets are set to zero, until the targets keep `target_r` triplets
on average at step `total_step - tfinal`. Trainable: init_r (in + out + 1) per target. Mergeable. Starts as a no-op: E
is zero. PEFT removes the zeroed triplets from its files. Such files can be loaded here; ours keep all triplets, so that
training can resume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, LowRank, Tensors
from ..core.config import Name, at, check_range
from ..errors import ConfigError, TargetError, listing
from ..files.read import PREFIX
from ..targets.target import Target
from .lora import LoraConfig


class AdaLoRA(LowRank):
    kinds = frozenset({"linear", "conv"})

    def __init__(self, config: AdaLoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.rank_of(target.path)
        self.lora_alpha = at(target.path, config.alpha_pattern, config.lora_alpha)
        self.scaling = self.lora_alpha / (config.init_r + 1e-5)  # as in PEFT, whose files rely on it
        self.lora_A = nn.Parameter(torch.empty(self.r, target.in_features))
        self.lora_B = nn.Parameter(torch.empty(target.out_features, self.r))
        self.lora_E = nn.Parameter(torch.zeros(self.r, 1))
        if config.init_lora_weights:
            nn.init.normal_(self.lora_A, std=0.02)
            nn.init.normal_(self.lora_B, std=0.02)
        else:
            for parameter in self.parameters():
                nn.init.normal_(parameter)
        self.set_dropout(config.lora_dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A * self.lora_E, self.lora_B * self.scaling

    def expected_parameters(self) -> int:
        return self.r * (self.target.in_features + self.target.out_features + 1)

    def describe(self) -> str:
        if self.lora_E.is_meta:
            return f"r={self.r}"
        remaining = int((self.lora_E != 0).sum())
        return f"r={remaining} of {self.r}"


FACTORS = ("lora_A", "lora_B", "lora_E")


@dataclass
class Averages:
    """Moving averages over the steps of training, for one parameter of a target."""

    sensitivity: Tensor
    """The average of |weight x gradient|."""
    uncertainty: Tensor
    """The average deviation of |weight x gradient| from its average."""

    def update(self, product: Tensor, beta1: float, beta2: float) -> None:
        """Include |weight x gradient| of one more step (eq. 9, 10)."""
        self.sensitivity = self.sensitivity.lerp(product, 1 - beta1)
        deviation = (product - self.sensitivity).abs()
        self.uncertainty = self.uncertainty.lerp(deviation, 1 - beta2)

    def score(self) -> Tensor:
        return self.sensitivity * self.uncertainty


class Allocation:
    """Decides which triplets to keep: the paper's algorithm 1, run after each step while gradients exist."""

    def __init__(self, config: AdaLoraConfig, adapters: Mapping[str, AdaLoRA]) -> None:
        self.config = config
        self.adapters = dict(adapters)
        self.averages: dict[str, tuple[Averages, Averages, Averages]] = {}  # of A, B and E, by path
        self.pruned: dict[str, Tensor] = {}

    def step(self, n: int) -> None:
        config = self.config
        last = config.total_step - config.tfinal
        if n < last:
            self.observe()
        if (config.tinit < n < last and n % config.deltaT == 0) or n == last:
            self.choose(self.budget(n))
        if n > last:
            self.apply()

    def budget(self, n: int) -> int:
        """How many triplets to keep after step n, on a cubic schedule (eq. 13)."""
        config = self.config
        first = sum(adapter.r for adapter in self.adapters.values())
        goal = config.target_r * len(self.adapters)
        steps = config.total_step - config.tfinal - config.tinit
        remaining = 1 - (n - config.tinit) / steps
        return int(goal + (first - goal) * max(remaining, 0.0) ** 3)

    @torch.no_grad()
    def observe(self) -> None:
        """Update the averages of every target that received gradients."""
        config = self.config
        for path, adapter in self.adapters.items():
            factors = tuple(getattr(adapter, factor) for factor in FACTORS)
            if any(factor.grad is None for factor in factors):
                continue
            if path not in self.averages:
                self.averages[path] = (_zeros(adapter.lora_A), _zeros(adapter.lora_B), _zeros(adapter.lora_E))
            for factor, averages in zip(factors, self.averages[path], strict=True):
                averages.update((factor * factor.grad).abs(), config.beta1, config.beta2)

    def importance(self, path: str) -> Tensor:
        """The score of each triplet of a target (eq. 8): (r,)."""
        A, B, E = self.averages[path]
        return E.score().flatten() + A.score().mean(dim=1) + B.score().mean(dim=0)

    def choose(self, budget: int) -> None:
        """Keep the `budget` most important triplets over all targets and zero the others."""
        scores = {path: self.importance(path) for path in self.averages}
        if not scores:
            return
        all_scores = torch.cat(list(scores.values()))
        surplus = len(all_scores) - budget
        if not 0 < surplus <= len(all_scores):
            return
        threshold = all_scores.kthvalue(surplus).values
        self.pruned = {path: score <= threshold for path, score in scores.items()}
        self.apply()

    def export(self) -> Tensors:
        """The averages and the pruned triplets, for the training that continues from a file."""
        tensors: Tensors = {}
        for path, of_factors in self.averages.items():
            for factor, averages in zip(FACTORS, of_factors, strict=True):
                tensors[f"{path}.{factor}.sensitivity"] = averages.sensitivity
                tensors[f"{path}.{factor}.uncertainty"] = averages.uncertainty
        for path, is_pruned in self.pruned.items():
            tensors[f"{path}.pruned"] = is_pruned
        return tensors

    def absorb(self, tensors: Tensors) -> None:
        """Continue from what `export` returned."""
        for path, adapter in self.adapters.items():
            device = adapter.lora_E.device
            if f"{path}.pruned" in tensors:
                self.pruned[path] = tensors[f"{path}.pruned"].to(device)
            if f"{path}.lora_E.sensitivity" not in tensors:
                continue
            of_factors = []
            for factor in FACTORS:
                sensitivity = tensors[f"{path}.{factor}.sensitivity"].to(device)
                uncertainty = tensors[f"{path}.{factor}.uncertainty"].to(device)
                of_factors.append(Averages(sensitivity, uncertainty))
            A, B, E = of_factors
            self.averages[path] = A, B, E

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the pruned triplets, which the optimizer may have moved."""
        for path, is_pruned in self.pruned.items():
            self.adapters[path].lora_E.masked_fill_(is_pruned[:, None], 0.0)


def _zeros(parameter: Tensor) -> Averages:
    return Averages(torch.zeros_like(parameter), torch.zeros_like(parameter))


@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    target_r: int = 8
    """Average rank of the targets at the end of the schedule."""
    init_r: int = 12
    """Rank of each target at the start."""
    tinit: int = 0
    """Steps before the first reduction of the rank."""
    tfinal: int = 0
    """Steps after the last reduction of the rank."""
    deltaT: int = 1
    """Steps between two reductions."""
    beta1: float = 0.85
    """Smoothing of the sensitivity."""
    beta2: float = 0.85
    """Smoothing of the uncertainty."""
    orth_reg_weight: float = 0.5
    """Weight of the loss term that keeps A and B orthogonal."""
    total_step: int | None = None
    """Number of optimizer steps of the whole training; required."""
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]
    """Which triplets a PEFT file holds, by the key of the target's lora_E, with or without PEFT's key prefixes."""

    peft_type = Name("ADALORA")
    adapter = AdaLoRA  # type: ignore[assignment]
    patterns = ("alpha_pattern",)  # type: ignore[assignment]
    for_training = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
    example = {"total_step": 1000}
    learning_rate = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variants() or isinstance(self.init_lora_weights, str):
            raise ConfigError(
                "AdaLoRA cannot be combined with variants such as use_dora, nor with a named init_lora_weights"
            )
        if self.total_step is None:
            raise ConfigError("total_step must be the number of optimizer steps of the whole training, not None")
        check_range(self, 1, math.inf, "total_step", "init_r", "deltaT")
        check_range(self, 0, 1, "beta1", "beta2")
        if self.tinit >= self.total_step - self.tfinal:
            condition = f"tinit {self.tinit} >= total_step {self.total_step} - tfinal {self.tfinal}"
            raise ConfigError(f"no steps are left to reduce the rank: {condition}")

    def build(self, target: Target, shared: nn.Module | None = None, **kwargs: Any) -> AdaLoRA:  # type: ignore[override]
        if self.target_r > self.init_r and not self.inference_mode:
            raise ConfigError(
                f"target_r {self.target_r} is above init_r {self.init_r}: the rank would never be reduced"
            )
        return AdaLoRA(self, target, shared)

    def rank_of(self, path: str) -> int:
        """The rank of one target: init_r, or the number of triplets in a pruned file, which may be 0."""
        for key, is_kept in (self.rank_pattern or {}).items():
            if _is_of(key, path):
                return sum(is_kept)
        return self.init_r

    def choose(self, paths: list[str]) -> list[str]:
        unmatched = []
        for key in self.rank_pattern or ():
            if not any(_is_of(key, path) for path in paths):
                unmatched.append(key)
        if unmatched:
            raise TargetError(f"rank_pattern: these keys are not the lora_E of any target:{listing(unmatched)}")
        return super().choose(paths)

    def schedule(self, adapters: Mapping[str, Adapter]) -> Allocation:
        return Allocation(self, adapters)  # type: ignore[arg-type]

    def loss(self, adapters: Sequence[Adapter]) -> Tensor:
        """orth_reg_weight x the mean of |A A^T - I| and |B^T B - I| over the targets (eq. 4)."""
        distances = []
        for adapter in adapters:
            A, B = adapter.lora_A, adapter.lora_B
            distances.append(_distance_from_identity(A @ A.T))
            distances.append(_distance_from_identity(B.T @ B))
        return self.orth_reg_weight * torch.stack(distances).mean()


def _distance_from_identity(gram: Tensor) -> Tensor:
    identity = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    return (gram - identity).norm()


def _is_of(key: str, path: str) -> bool:
    """Whether a key of `rank_pattern` belongs to the target at `path`."""
    name = key.removeprefix(PREFIX).removeprefix("model.")
    return name.startswith(path.removeprefix("model.") + ".lora_E")
