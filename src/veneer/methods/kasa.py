"""KaSA: replace the smallest singular components of the weight by a learned update in the form of an SVD.

    W' = W - U_d S_d V_d^T + s B diag(e) A,  d the r smallest singular values of W = U S V^T

Wang et al., 2024, arXiv:2412.06071. The loss gets an additional term, beta |e|^2 + gamma (|B^T B - I| + |A A^T - I|),
for each target (eq. 9 to 12). Trainable: r (in + out + 1) per target. Mergeable. Starts at the truncated weight, not as
a no-op. Unlike in PEFT, the base model keeps its weights: the dropped components are subtracted as a pair of factors,
so KaSA can be disabled and combined with other adapters. KaSA suits models whose smallest singular values are noise.
Dropping them raises the loss of SmolLM2-135M by 4; with KaSA's learning rate of 1e-2, ten times LoRA's, training
regains that within 60 steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import check_range
from ..errors import ConfigError, TargetError
from ..targets.target import Target
from .families.variants import Composition, Settings
from .lora import LoRA, LoraConfig


@dataclass(kw_only=True)
class KasaConfig(Settings):
    beta: float = 1e-4
    """Weight of the penalty |e|^2 on the learned singular values."""
    gamma: float = 1e-3
    """Weight of the penalty on the distance of A and B from orthonormal matrices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, math.inf, "beta", "gamma")


class KaSA(LoRA):
    kinds = frozenset({"linear"})
    settings = KasaConfig
    pads = False
    excludes_dropped = False
    """Whether `factors` returns only the learned part, without subtracting the dropped components."""

    def __init__(self, config: LoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.lora_diag = nn.Parameter(torch.randn(self.r))
        W = target.original_weight().float()
        if self.r >= min(W.shape):
            raise TargetError(f"KaSA drops r = {self.r} singular values and leaves none of a weight {tuple(W.shape)}")
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        dropped_A = Vh[-self.r :].contiguous()  # (r, in)
        dropped_B = U[:, -self.r :] * S[-self.r :]  # (out, r)
        self.register_buffer("dropped_A", dropped_A, persistent=False)
        self.register_buffer("dropped_B", dropped_B, persistent=False)

    @classmethod
    def check(cls, config: Any) -> None:
        if config.init_lora_weights not in (True, False, "gaussian", "mica"):
            raise ConfigError(
                f"kasa_config with init_lora_weights={config.init_lora_weights!r}: the singular values that KaSA "
                "learns would scale a start that is subtracted unscaled; use True"
            )

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        A = A * self.lora_diag[:, None]
        if self.excludes_dropped:
            return A, B
        A = torch.cat([A, self.dropped_A])
        B = torch.cat([B, -self.dropped_B], dim=1)
        return A, B

    def term(self, x: Tensor) -> Tensor:
        """The update. Dropout, and what other variants do to its input, apply only to the learned part."""
        self.excludes_dropped = True
        try:
            return super().term(x) - self.target.low_rank(x, self.dropped_A, self.dropped_B)
        finally:
            self.excludes_dropped = False

    @classmethod
    def loss(cls, config: Any, adapters: Sequence[KaSA]) -> Tensor | None:
        penalties = [adapter.penalty() for adapter in adapters]
        return torch.stack(penalties).sum()

    def penalty(self) -> Tensor:
        A, B = super().factors()
        B = B / self.scaling
        eye = torch.eye(self.r, device=A.device, dtype=A.dtype)
        distance_of_B = (B.T @ B - eye).norm()
        distance_of_A = (A @ A.T - eye).norm()
        settings = self.config.kasa_config
        values = settings.beta * self.lora_diag.square().sum()
        return values + settings.gamma * (distance_of_B + distance_of_A)

    def expected_parameters(self) -> int:
        return super().expected_parameters() + self.r


@dataclass(kw_only=True)
class KasaLoraConfig(LoraConfig):
    """Equivalent to `LoraConfig(kasa_config=KasaConfig())`."""

    kasa_config: Settings | dict[str, Any] | None = field(default_factory=KasaConfig)
    """`KasaConfig`: the weights of the penalties in the loss."""

    adapter = Composition(KaSA)  # type: ignore[assignment]
    learning_rate = 1e-2
