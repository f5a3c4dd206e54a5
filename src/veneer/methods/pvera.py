"""PVeRA: VeRA with low-rank activations that are sampled from a Gaussian that depends on the input.

    y' = W x + diag(b) B z,  z = mu + exp(v / 2) * e,  e ~ N(0, 1),  (mu, v) = diag(d) A x

A (2 r, in) and B (out, r) are random, frozen, and sliced from one shared pair to each target's size. z is sampled in
training and with `sample_at_inference`; otherwise it is mu. Fillioux et al., 2025, arXiv:2512.07703. Trainable: 2 r +
out per target. Mergeable, with z at its mean. Starts as a no-op: b is zero.

Unlike in PEFT, an adapter that samples at inference is not mergeable, since a merged weight would always use the mean.
`generator_seed` gives each target its own noise, which gradient checkpointing reproduces; in PEFT all targets of one
shape get the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from ..core.adapter import LowRank
from ..core.config import LayerConfig, Name, check_range
from ..errors import NotMergeable
from ..targets.target import Target
from .vera import Projections


class PVeRA(LowRank):
    def __init__(self, config: PveraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.r
        self.samples_always = config.sample_at_inference
        self.has_fold = not self.samples_always
        if config.init_weights:
            d = torch.full((2 * self.r,), float(config.d_initial))
            b = torch.zeros(target.out_features)
        else:
            d = torch.randn(2 * self.r)
            b = torch.ones(target.out_features)
        self.pvera_lambda_d = nn.Parameter(d)
        self.pvera_lambda_b = nn.Parameter(b)
        self.set_dropout(config.pvera_dropout)

    def scaled(self) -> tuple[Tensor, Tensor]:
        """diag(d) A (2 r, in) and diag(b) B (out, r)."""
        d = self.pvera_lambda_d[:, None]
        b = self.pvera_lambda_b[:, None]
        A = self.shared.pvera_A[:, : self.target.in_features]
        B = self.shared.pvera_B[: self.target.out_features]
        return d * A.to(d), b * B.to(b)

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.samples_always:
            raise NotMergeable(f"PVeRA on {self.target.path!r} samples at inference, which a merged weight cannot do")
        A, B = self.scaled()
        return A[: self.r], B

    def term(self, x: Tensor) -> Tensor:
        if not (self.training or self.samples_always):
            return super().term(x)
        A, B = self.scaled()
        if self.dropout is not None:
            x = self.dropout(x)
        mean, log_variance = nn.functional.linear(x, A).chunk(2, dim=-1)  # (..., r) each
        deviation = (log_variance / 2).exp()
        z = mean + deviation * self.noise(mean)
        return nn.functional.linear(z, B)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal noise, shaped like `like`. With a seed, it depends on the target and the number of calls."""
        if self.config.generator_seed is None:
            return torch.randn_like(like)
        call = self.target.layer.state.facts.get(self.shared, 0)
        seed = crc32(f"{self.config.generator_seed} {call} {self.target.path}".encode())
        generator = torch.Generator(device="cpu").manual_seed(seed)
        return torch.randn(like.shape, generator=generator, device="cpu").to(like)

    def expected_parameters(self) -> int:
        return 2 * self.r + self.target.out_features

    def describe(self) -> str:
        return f"r={self.r}"


@dataclass(kw_only=True)
class PveraConfig(LayerConfig):
    r: int = 256
    """Rank of the shared projections. Each unit of it has few parameters, so the default is larger than LoRA's."""
    projection_prng_key: int = 0
    """Seed of the projections."""
    save_projection: bool = True
    """Also write the projections to the file; False: regenerate them from the seed."""
    pvera_dropout: float = 0.0
    """Dropout on the input of the update during training."""
    d_initial: float = 0.1
    """Initial value of d."""
    init_weights: bool = True
    """Start as a no-op; False: d is random and b is one (for tests)."""
    sample_at_inference: bool = False
    """Sample at inference too, e.g. for confidence intervals over several passes; False: use the mean."""
    generator_seed: int | None = None
    """Seed of the noise, which then also depends on the number of earlier calls; None: use torch's global generator."""

    peft_type = Name("PVERA")
    adapter = PVeRA
    learning_rate = 2e-2
    recommended = {"save_projection": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
        check_range(self, 0, 1, "pvera_dropout")

    def build_shared(self, targets: Sequence[Target]) -> Projections:
        widest = max(target.in_features for target in targets)
        tallest = max(target.out_features for target in targets)
        shapes = {"pvera_A": (2 * self.r, widest), "pvera_B": (tallest, self.r)}
        shared = Projections(shapes, self.projection_prng_key, self.save_projection)
        shared.calls = 0  # type: ignore[assignment]
        return shared

    def before(self, shared: Any, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        if self.generator_seed is not None:
            shared.calls += 1
            facts[shared] = shared.calls
