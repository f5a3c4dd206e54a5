"""KaSA: drop the weight's smallest singular components and learn an update in SVD form in their place.

    W' = W - U_d S_d V_d^T + s B diag(e) A,  d the r smallest singular values of W = U S V^T

Wang et al., 2024, arXiv:2412.06071; the loss has beta |e|^2 + gamma (|B^T B - I| + |A A^T - I|) for each target (eq. 9
to 12). Trainable: r (in + out + 1) per target. Mergeable. It starts as the truncated weight. Unlike PEFT's, the base
model stays whole: the dropped part is a pair of factors, so KaSA may be switched off, and stand beside other adapters.
It is for models whose smallest singular values are noise: SmolLM2-135M loses 4 in loss with them, which its learning
rate of 1e-2, ten times LoRA's, wins back within 60 steps.
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
    """Weight in the loss of the squares of the singular values."""
    gamma: float = 1e-3
    """Weight in the loss of the distance of A and B from orthonormality."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, math.inf, "beta", "gamma")


class KaSA(LoRA):
    kinds = frozenset({"linear"})
    settings = KasaConfig
    pads = False
    apart = False

    def __init__(self, config: LoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.lora_diag = nn.Parameter(torch.randn(self.r))
        W = target.original_weight().float()
        if self.r >= min(W.shape):
            raise TargetError(f"KaSA drops r = {self.r} singular values and leaves none of a weight {tuple(W.shape)}")
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        self.register_buffer("dropped_A", Vh[-self.r :].contiguous(), persistent=False)
        self.register_buffer("dropped_B", U[:, -self.r :] * S[-self.r :], persistent=False)

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
        return (A, B) if self.apart else (torch.cat([A, self.dropped_A]), torch.cat([B, -self.dropped_B], dim=1))

    def update(self, x: Tensor) -> Tensor:
        """Dropout, and whatever else falls on the update's input, is not for what the weight has lost."""
        self.apart = True
        try:
            return super().update(x) - self.target.low_rank(x, self.dropped_A, self.dropped_B)
        finally:
            self.apart = False

    @classmethod
    def loss(cls, config: Any, adapters: Sequence[KaSA]) -> Tensor | None:
        return torch.stack([adapter.penalty() for adapter in adapters]).sum()

    def penalty(self) -> Tensor:
        A, B = super().factors()
        B, eye, weights = B / self.scaling, torch.eye(self.r, device=A.device, dtype=A.dtype), self.config.kasa_config
        distance = (B.T @ B - eye).norm() + (A @ A.T - eye).norm()
        return weights.beta * self.lora_diag.square().sum() + weights.gamma * distance

    def expected_parameters(self) -> int:
        return super().expected_parameters() + self.r


@dataclass(kw_only=True)
class KasaLoraConfig(LoraConfig):
    """`LoraConfig(kasa_config=KasaConfig())` under a name of its own."""

    kasa_config: Settings | dict[str, Any] | None = field(default_factory=KasaConfig)
    """`KasaConfig`: the weights of its terms in the loss."""

    adapter = Composition(KaSA)  # type: ignore[assignment]
    learning_rate = 1e-2
