"""`peft.tuners.lora.monteclora`: the sampler of a MonteCLoRA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...methods.monteclora import MontecloraConfig, Sampler


class SamplerMarker(type):
    """Every sampler is an instance, also one that veneer's method has made."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Sampler)


class MontecloraSampler(metaclass=SamplerMarker):
    """Makes a sampler of the noise that is added to A, (in_features, in_features) being A's (rank, rank)."""

    def __new__(  # type: ignore[misc]
        cls,
        in_features: int,
        out_features: int,
        num_samples: int,
        use_entropy: bool = True,
        dirichlet_prior: float = 1.0,
        sample_scaler: float = 3e-4,
        kl_loss_weight: float = 1e-5,
        buffer_size: int = 10,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> Sampler:
        config = MontecloraConfig(
            num_samples=num_samples,
            use_entropy=use_entropy,
            dirichlet_prior=dirichlet_prior,
            sample_scaler=sample_scaler,
            kl_loss_weight=kl_loss_weight,
            buffer_size=buffer_size,
        )
        return Sampler(config, out_features).to(device=device, dtype=dtype)

    @staticmethod
    def get_variational_loss(self: Any) -> tuple[Tensor | float, Tensor | float]:
        """(divergence from the priors, entropy) of a sampler; zeros unless it is training."""
        if not self.training or self.u is None:
            return 0.0, 0.0
        entropy: Tensor | float = self.weights().square().sum() if self.config.use_entropy else 0.0
        return self.config.kl_loss_weight * self.divergence(), entropy

    def forward(self: Any, A: Tensor) -> Tensor:
        return Sampler.forward(self, A)
