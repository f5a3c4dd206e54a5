"""MonteCLoRA: sample A around its mean during training, with a learned spread and mixture.

    A~ = A + c sum_i w_i Z_i,  Z_i ~ N(0, D),  D = diag(e^(2 sigma) u),  u ~ chi^2_r,  w ~ Dirichlet(e^p)

Seth et al., 2024, arXiv:2411.04358; D is the diagonal of a Wishart sample. Trainable: r (in + out + 1) + N per target.
Mergeable: the mean is merged. Starts as a no-op. The sum over the N samples is drawn as a single Gaussian with the same
distribution, c |w| Z.
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
    """N: the number of samples in a mixture."""
    use_entropy: bool = False
    """Add the sum of the squared weights w to the loss, which prevents a collapse onto one sample."""
    dirichlet_prior: float = 0.1
    """Concentration of the prior over the weights w; larger values make them more even."""
    sample_scaler: float = 1e-4
    """c: the factor of the samples."""
    kl_loss_weight: float = 1e-5
    """Weight of the KL divergence from the priors in the loss."""
    buffer_size: int = 150
    """Ignored; kept for PEFT compatibility."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "num_samples", "buffer_size")
        check_range(self, 1e-12, math.inf, "dirichlet_prior")


class Sampler(nn.Module):
    """Samples the noise that is added to A. As in PEFT's files, the buffers hold the last sample."""

    def __init__(self, config: MontecloraConfig, r: int) -> None:
        super().__init__()
        self.config = config
        self.u: Any = None  # the last sample of chi^2_r
        self.z: Any = None  # the normal variables behind the last sample of w
        self.std_prior = nn.Parameter(torch.rand(r))
        self.expert_weights_prior = nn.Parameter(torch.rand(config.num_samples))
        self.register_buffer("gaussian_var_prior", torch.eye(r))
        even = torch.full((config.num_samples,), 1 / config.num_samples)
        self.register_buffer("expert_weights", even)

    def forward(self, A: Tensor) -> Tensor:
        """A sample of the noise that is added to A."""
        r = len(A)
        normals = torch.randn(r, r, device=A.device, dtype=A.dtype)
        self.u = normals.square().sum(1)
        self.z = torch.randn_like(self.expert_weights_prior)
        D = self.variance()
        w = self.weights()
        self.gaussian_var_prior = D.detach().diag()
        self.expert_weights = w.detach()
        Z = torch.randn_like(A)
        scale = self.config.sample_scaler * w.norm() * D.sqrt()[:, None]  # (r, 1)
        return scale * Z

    def variance(self) -> Tensor:
        """The diagonal of D, (r,)."""
        scale = (2 * self.std_prior).exp()
        return (scale * self.u).clamp_min(1e-3)

    def weights(self) -> Tensor:
        """A sample of w, by Laplace's approximation of the Dirichlet distribution: a softmax of Gaussians."""
        n = self.config.num_samples
        a = self.expert_weights_prior.exp()
        variance = (1 - 2 / n) / a + (1 / a).sum() / n**2
        variance = variance.clamp_min(1e-6)
        mean = a.log() - a.log().mean()
        return (mean + variance.sqrt() * self.z).softmax(-1)

    def penalty(self) -> Tensor:
        """The term of the loss for this target."""
        penalty = self.config.kl_loss_weight * self.divergence()
        if self.config.use_entropy:
            penalty = penalty + self.weights().square().sum()
        return penalty

    def divergence(self) -> Tensor:
        """KL divergence of the three distributions from their priors (in PEFT, the Dirichlet term has a wrong sign)."""
        a = self.expert_weights_prior.exp()
        n = len(a)
        p = self.config.dirichlet_prior
        dirichlet = a.sum().lgamma() - a.lgamma().sum() - math.lgamma(n * p) + n * math.lgamma(p)
        difference = a - p
        log_means = a.digamma() - a.sum().digamma()
        dirichlet = dirichlet + (difference * log_means).sum()
        e = (2 * self.std_prior).exp()
        wishart = len(e) / 2 * (e - e.log() - 1).sum()
        D = self.variance()
        gaussian = n / 2 * (D - D.log() - 1).sum()
        return dirichlet + wishart + gaussian


class MonteCLoRA(LoRA):
    kinds = frozenset({"linear"})
    settings = MontecloraConfig
    noise: Tensor | None = None
    """The sample that is added to A in the current forward pass."""

    def __init__(self, config: LoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.lora_monteclora_sampler = Sampler(config.monteclora_config, self.r)  # type: ignore[arg-type]

    def matrices(self) -> tuple[Tensor, Tensor]:
        A, B = super().matrices()
        if self.noise is not None:
            A = A + self.noise
        return A, B

    def term(self, x: Tensor) -> Tensor:
        if self.training:
            self.noise = self.lora_monteclora_sampler(self.lora_A.weight)
        try:
            return super().term(x)
        finally:
            self.noise = None

    @classmethod
    def loss(cls, config: Any, adapters: Sequence[MonteCLoRA]) -> Tensor | None:
        terms = []
        for adapter in adapters:
            sampler = adapter.lora_monteclora_sampler
            if adapter.training and sampler.u is not None:
                terms.append(sampler.penalty())
        return torch.stack(terms).mean() if terms else None

    def expected_parameters(self) -> int:
        return super().expected_parameters() + self.r + self.config.monteclora_config.num_samples


@dataclass(kw_only=True)
class MontecloraLoraConfig(LoraConfig):
    """Equivalent to `LoraConfig(monteclora_config=MontecloraConfig())`."""

    monteclora_config: Settings | dict[str, Any] | None = field(default_factory=MontecloraConfig)
    """`MontecloraConfig`: how A is sampled."""

    adapter = Composition(MonteCLoRA)  # type: ignore[assignment]
