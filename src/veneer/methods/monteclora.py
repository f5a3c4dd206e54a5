"""MonteCLoRA: in training A is a sample around its mean, whose spread and mixture are learned.

    A~ = A + c sum_i w_i Z_i,  Z_i ~ N(0, D),  D = diag(e^(2 sigma) u),  u ~ chi^2_r,  w ~ Dirichlet(e^p)

Seth et al., 2024, arXiv:2411.04358; D is the diagonal of a Wishart draw. Trainable: r (in + out + 1) + N per target.
Mergeable as its mean. Starts as a no-op. The N samples are drawn as the one Gaussian that their mixture is, c |w| Z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import check_range
from ..targets.target import Target
from .families.variants import Composition, Settings
from .lora import LoRA, LoraConfig


@dataclass(kw_only=True)
class MontecloraConfig(Settings):
    num_samples: int = 8
    """N: samples of a mixture."""
    use_entropy: bool = False
    """Add the sum of the squared weights to the loss, against a collapse onto one sample."""
    dirichlet_prior: float = 0.1
    """Concentration of the prior over weights; larger is more even."""
    sample_scaler: float = 1e-4
    """c: strength of the samples."""
    kl_loss_weight: float = 1e-5
    """Weight of the divergence from the priors in the loss."""
    buffer_size: int = 150
    """Of PEFT's store of samples; kept for the file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "num_samples", "buffer_size")
        check_range(self, 1e-12, math.inf, "dirichlet_prior")


class Sampler(nn.Module):
    def __init__(self, config: MontecloraConfig, r: int) -> None:
        super().__init__()
        self.config = config
        self.u: Any = None  # the last draws
        self.std_prior = nn.Parameter(torch.rand(r))
        self.expert_weights_prior = nn.Parameter(torch.rand(config.num_samples))
        self.register_buffer("gaussian_var_prior", torch.eye(r))
        self.register_buffer("expert_weights", torch.full((config.num_samples,), 1 / config.num_samples))

    def forward(self, A: Tensor) -> Tensor:
        """A draw of what is added to A."""
        self.u = torch.randn(len(A), len(A), device=A.device, dtype=A.dtype).square().sum(1)
        self.z: Any = torch.randn_like(self.expert_weights_prior)
        D, w = self.variance(), self.weights()
        self.gaussian_var_prior, self.expert_weights = D.detach().diag(), w.detach()
        return self.config.sample_scaler * w.norm() * D.sqrt()[:, None] * torch.randn_like(A)

    def variance(self) -> Tensor:
        return ((2 * self.std_prior).exp() * self.u).clamp_min(1e-3)

    def weights(self) -> Tensor:
        """Laplace's approximation of a Dirichlet draw: a softmax of Gaussians."""
        n, a = self.config.num_samples, self.expert_weights_prior.exp()
        spread = ((1 - 2 / n) / a + (1 / a).sum() / n**2).clamp_min(1e-6)
        return (a.log() - a.log().mean() + spread.sqrt() * self.z).softmax(-1)

    def penalty(self) -> Tensor:
        """Divergences of the three distributions from their priors (of the Dirichlet's, PEFT has a sign wrong)."""
        a, e, D = self.expert_weights_prior.exp(), (2 * self.std_prior).exp(), self.variance()
        n, p = len(a), self.config.dirichlet_prior
        kl = a.sum().lgamma() - a.lgamma().sum() - math.lgamma(n * p) + n * math.lgamma(p)
        kl = kl + ((a - p) * (a.digamma() - a.sum().digamma())).sum()
        kl = kl + len(e) / 2 * (e - e.log() - 1).sum() + n / 2 * (D - D.log() - 1).sum()
        return self.config.kl_loss_weight * kl + (self.weights().square().sum() if self.config.use_entropy else 0)


class MonteCLoRA(LoRA):
    kinds = frozenset({"linear"})
    settings = MontecloraConfig
    noise: Tensor | None = None

    def __init__(self, config: LoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.lora_monteclora_sampler = Sampler(config.monteclora_config, self.r)  # type: ignore[arg-type]

    def matrices(self) -> tuple[Tensor, Tensor]:
        A, B = super().matrices()
        return A if self.noise is None else A + self.noise, B

    def update(self, x: Tensor) -> Tensor:
        self.noise = self.lora_monteclora_sampler(self.lora_A.weight) if self.training else None
        try:
            return super().update(x)
        finally:
            self.noise = None

    @classmethod
    def loss(cls, config: Any, adapters: Sequence[MonteCLoRA]) -> Tensor | None:
        samplers = [a.lora_monteclora_sampler for a in adapters if a.training]
        terms = [sampler.penalty() for sampler in samplers if sampler.u is not None]
        return torch.stack(terms).mean() if terms else None

    def expected_parameters(self) -> int:
        return super().expected_parameters() + self.r + self.config.monteclora_config.num_samples


@dataclass(kw_only=True)
class MontecloraLoraConfig(LoraConfig):
    """`LoraConfig(monteclora_config=MontecloraConfig())` under a name of its own."""

    monteclora_config: Settings | dict[str, Any] | None = field(default_factory=MontecloraConfig)
    """`MontecloraConfig`: how A is sampled."""

    adapter = Composition(MonteCLoRA)  # type: ignore[assignment]
