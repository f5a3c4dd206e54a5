"""AdaLoRA: learn the update as a product like an SVD and give the rank to the targets that need it.

    W' = W + s B diag(E) A,  s = alpha / init_r,  |A A^T - I|, |B^T B - I| small

Zhang et al., 2023, arXiv:2303.10512. A triplet (a row of A, an entry of E, a column of B) has an importance (eq. 8-10);
from `tinit` on the least important are zeroed, down to `target_r` for the average target at `total_step - tfinal`.
Trainable: init_r (in + out + 1) per target. Mergeable. Starts as a no-op: E is zero. PEFT cuts the zeroed triplets out
of its files; those are read too, while ours keep them, so that training can resume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, LowRank
from ..core.config import Name, at, check_range
from ..errors import ConfigError, TargetError, listing
from ..targets.target import Target
from .lora import LoraConfig


class AdaLoRA(LowRank):
    kinds = frozenset({"linear", "conv"})

    def __init__(self, config: AdaLoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.rank_of(target.path)
        self.lora_alpha = at(target.path, config.alpha_pattern, config.lora_alpha)
        self.scaling = self.lora_alpha / (config.init_r + 1e-5)  # PEFT's files divide by this
        self.lora_A = nn.Parameter(torch.empty(self.r, target.in_features))
        self.lora_B = nn.Parameter(torch.empty(target.out_features, self.r))
        self.lora_E = nn.Parameter(torch.zeros(self.r, 1))
        for factor in (self.lora_A, self.lora_B) if config.init_lora_weights else (*self.parameters(),):
            nn.init.normal_(factor, std=0.02 if config.init_lora_weights else 1.0)
        self.set_dropout(config.lora_dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A * self.lora_E, self.lora_B * self.scaling

    def expected_parameters(self) -> int:
        return self.r * (self.target.in_features + self.target.out_features + 1)

    def describe(self) -> str:
        return f"r={int((self.lora_E != 0).sum())} of {self.r}" if not self.lora_E.is_meta else f"r={self.r}"


class Allocation:
    """Which triplets live: the paper's algorithm 1, run after each optimizer step while the gradients are there."""

    def __init__(self, config: AdaLoraConfig, adapters: Mapping[str, AdaLoRA]) -> None:
        self.config, self.adapters = config, dict(adapters)
        self.sensitivity: dict[str, list[Tensor]] = {}
        self.uncertainty: dict[str, list[Tensor]] = {}
        self.dead: dict[str, Tensor] = {}

    def step(self, n: int) -> None:
        config = self.config
        last = config.total_step - config.tfinal
        if n < last:
            self.observe()
        if (config.tinit < n < last and n % config.deltaT == 0) or n == last:
            self.choose(self.budget(n))
        if n > last:
            self.silence()

    def budget(self, n: int) -> int:
        """How many triplets may live after step n: a cubic way down (eq. 13)."""
        config = self.config
        first, goal = sum(a.r for a in self.adapters.values()), config.target_r * len(self.adapters)
        share = 1 - (n - config.tinit) / (config.total_step - config.tfinal - config.tinit)
        return int(goal + (first - goal) * max(share, 0.0) ** 3)

    @torch.no_grad()
    def observe(self) -> None:
        """Move the averages of |weight x gradient| and of its spread (eq. 9, 10)."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        for path, adapter in self.adapters.items():
            factors = [adapter.lora_A, adapter.lora_B, adapter.lora_E]
            if any(p.grad is None for p in factors):
                continue
            now = [(p * p.grad).abs() for p in factors]
            zeros = [torch.zeros_like(t) for t in now]
            mean = [s.lerp(t, 1 - beta1) for s, t in zip(self.sensitivity.get(path, zeros), now, strict=True)]
            spread = [(t - s).abs() for s, t in zip(mean, now, strict=True)]
            old = self.uncertainty.get(path, zeros)
            self.uncertainty[path] = [u.lerp(t, 1 - beta2) for u, t in zip(old, spread, strict=True)]
            self.sensitivity[path] = mean

    def importance(self, path: str) -> Tensor:
        """One score for each triplet of a target (eq. 8): (r,)."""
        A, B, E = (s * u for s, u in zip(self.sensitivity[path], self.uncertainty[path], strict=True))
        return E.flatten() + A.mean(dim=1) + B.mean(dim=0)

    def choose(self, budget: int) -> None:
        """Let the `budget` most important triplets of all targets live."""
        scores = {path: self.importance(path) for path in self.sensitivity}
        total = sum(len(score) for score in scores.values())
        if not 0 < total - budget <= total:
            return
        threshold = torch.cat(list(scores.values())).kthvalue(total - budget).values
        self.dead = {path: score <= threshold for path, score in scores.items()}
        self.silence()

    @torch.no_grad()
    def silence(self) -> None:
        for path, dead in self.dead.items():
            self.adapters[path].lora_E.masked_fill_(dead[:, None], 0.0)


@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    target_r: int = 8
    """Average rank of a target in the end."""
    init_r: int = 12
    """Rank of each target in the beginning."""
    tinit: int = 0
    """Steps before the first cut."""
    tfinal: int = 0
    """Steps after the last cut."""
    deltaT: int = 1
    """Steps between two cuts."""
    beta1: float = 0.85
    """Smoothing of the sensitivity."""
    beta2: float = 0.85
    """Smoothing of the uncertainty."""
    orth_reg_weight: float = 0.5
    """Weight of the term that keeps A and B orthogonal."""
    total_step: int | None = None
    """Optimizer steps of the whole training; required."""
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]
    """Which triplets a PEFT file still holds, by the key of a target's lora_E; what stands before its path varies."""

    peft_type, adapter, patterns = Name("ADALORA"), AdaLoRA, ("alpha_pattern",)  # type: ignore[assignment]
    example, learning_rate = {"total_step": 1000}, 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variants() or isinstance(self.init_lora_weights, str):
            raise ConfigError("AdaLoRA has its own form and start: neither use_dora and its like nor init names apply")
        if self.total_step is None:
            raise ConfigError("total_step must be the number of optimizer steps of the whole training, not None")
        check_range(self, 1, math.inf, "total_step", "init_r", "deltaT")
        check_range(self, 0, 1, "beta1", "beta2")
        if self.tinit >= self.total_step - self.tfinal:
            left = f"tinit {self.tinit} >= total_step {self.total_step} - tfinal {self.tfinal}"
            raise ConfigError(f"no steps are left to cut ranks in: {left}")

    def build(self, target: Target, shared: nn.Module | None = None, **kwargs: Any) -> AdaLoRA:  # type: ignore[override]
        if self.target_r > self.init_r and not self.inference_mode:
            raise ConfigError(f"target_r {self.target_r} is above init_r {self.init_r}: no rank would ever be cut")
        return AdaLoRA(self, target, shared)

    def rank_of(self, path: str) -> int:
        """init_r, or what a cut file still holds of a target; 0 is legal there."""
        return next((sum(alive) for key, alive in (self.rank_pattern or {}).items() if _is_of(key, path)), self.init_r)

    def choose(self, paths: list[str]) -> list[str]:
        if stray := [key for key in self.rank_pattern or () if not any(_is_of(key, path) for path in paths)]:
            raise TargetError(f"rank_pattern: these keys are the lora_E of none of the targets:{listing(stray)}")
        return super().choose(paths)

    def schedule(self, adapters: Mapping[str, Adapter]) -> Allocation:
        return Allocation(self, adapters)  # type: ignore[arg-type]

    def loss(self, adapters: Sequence[Adapter]) -> Tensor:
        """orth_reg_weight x the mean of |A A^T - I| and |B^T B - I| over the targets (eq. 4)."""
        products = [p for a in adapters for p in (a.lora_A @ a.lora_A.T, a.lora_B.T @ a.lora_B)]
        norms = [(p - torch.eye(len(p), device=p.device, dtype=p.dtype)).norm() for p in products]
        return self.orth_reg_weight * torch.stack(norms).mean()


def _is_of(key: str, path: str) -> bool:
    name = key.removeprefix("base_model.model.").removeprefix("model.")
    return name.startswith(path.removeprefix("model.") + ".lora_E")
