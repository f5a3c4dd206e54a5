"""PVeRA: VeRA whose low-rank activations are drawn from a Gaussian that depends on the input.

    y' = W x + diag(b) B z,  z = mu + exp(v / 2) * e,  e ~ N(0, 1),  (mu, v) = diag(d) A x

A (2 r, in) and B (out, r) are random, frozen, cut from one pair to each target's size. z is drawn in training and with
`sample_at_inference`; otherwise it is mu. Fillioux et al., 2025, arXiv:2512.07703. Trainable: 2 r + out per target.
Mergeable, as its mean. Starts as a no-op: b is zero.

Unlike PEFT, what samples at inference is not merged, since its weight would be the mean; and `generator_seed` gives
each target noise of its own (in PEFT all of one shape draw the same), which gradient checkpointing repeats.
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
        self.r, self.always = config.r, config.sample_at_inference
        self.has_fold = not self.always
        d = torch.full((2 * self.r,), float(config.d_initial)) if config.init_weights else torch.randn(2 * self.r)
        self.pvera_lambda_d = nn.Parameter(d)
        self.pvera_lambda_b = nn.Parameter((torch.zeros if config.init_weights else torch.ones)(target.out_features))
        self.set_dropout(config.pvera_dropout)

    def scaled(self) -> tuple[Tensor, Tensor]:
        """diag(d) A (2 r, in) and diag(b) B (out, r)."""
        d, b = self.pvera_lambda_d[:, None], self.pvera_lambda_b[:, None]
        return d * self.shared.pvera_A[:, : self.target.in_features].to(d), b * self.shared.pvera_B[: len(b)].to(b)

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.always:
            raise NotMergeable(f"PVeRA on {self.target.path!r} samples at inference, which a weight cannot")
        A, B = self.scaled()
        return A[: self.r], B

    def update(self, x: Tensor) -> Tensor:
        if not (self.training or self.always):
            return super().update(x)
        (A, B), x = self.scaled(), x if self.dropout is None else self.dropout(x)
        mean, log_variance = nn.functional.linear(x, A).chunk(2, dim=-1)
        return nn.functional.linear(mean + (log_variance / 2).exp() * self.noise(mean), B)

    def noise(self, like: Tensor) -> Tensor:
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
    """Rank of the shared projections; cheap, so larger than LoRA's."""
    projection_prng_key: int = 0
    """Seed of the projections."""
    save_projection: bool = True
    """Write the projections into the file too; False: regenerated from the seed."""
    pvera_dropout: float = 0.0
    """Dropout on the input of the update, in training."""
    d_initial: float = 0.1
    """Start value of d."""
    init_weights: bool = True
    """Start as a no-op; False: d random, b one (for tests)."""
    sample_at_inference: bool = False
    """Draw at inference too, say for confidence intervals over several passes; False: the mean."""
    generator_seed: int | None = None
    """Seed of the draws, which then depend on it and on how many calls came before; None: torch's generator."""

    peft_type, adapter = Name("PVERA"), PVeRA
    learning_rate = 2e-2
    recommended = {"save_projection": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
        check_range(self, 0, 1, "pvera_dropout")

    def build_shared(self, targets: Sequence[Target]) -> Projections:
        widest, tallest = max(t.in_features for t in targets), max(t.out_features for t in targets)
        shapes = {"pvera_A": (2 * self.r, widest), "pvera_B": (tallest, self.r)}
        shared = Projections(shapes, self.projection_prng_key, self.save_projection)
        shared.calls = 0  # type: ignore[assignment]
        return shared

    def before(self, shared: Any, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        if self.generator_seed is not None:
            facts[shared] = shared.calls = shared.calls + 1
