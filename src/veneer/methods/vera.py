"""VeRA: learn vectors that scale frozen random projections, which all layers share.

    W' = W + diag(b) B diag(d) A,  A (r, in) and B (out, r) random, frozen, sliced from one pair to each target's size

Kopiczko et al., 2023, arXiv:2310.11454. Trainable: r + out per target. Mergeable. Starts as a no-op: b is zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import LowRank
from ..core.config import LayerConfig, Name, check_range
from ..maths.bases import kaiming
from ..targets.target import Target


class Projections(nn.Module):
    """A pair of random matrices that all layers share, the same on every machine for the same seed."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], seed: int, saved: bool) -> None:
        super().__init__()
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for name, shape in shapes.items():
            self.register_buffer(name, kaiming(*shape, generator=generator), persistent=saved)


class VeRA(LowRank):
    def __init__(self, config: VeraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.r
        self.vera_lambda_d = nn.Parameter(torch.full((self.r,), float(config.d_initial)))
        self.vera_lambda_b = nn.Parameter(torch.zeros(target.out_features))
        if not config.init_weights:
            nn.init.normal_(self.vera_lambda_b)
            nn.init.normal_(self.vera_lambda_d)
        self.set_dropout(config.vera_dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        A = self.shared.vera_A[:, : self.target.in_features].to(self.vera_lambda_d)
        B = self.shared.vera_B[: self.target.out_features].to(self.vera_lambda_b)
        d = self.vera_lambda_d[:, None]
        b = self.vera_lambda_b[:, None]
        return d * A, b * B

    def expected_parameters(self) -> int:
        return self.r + self.target.out_features

    def describe(self) -> str:
        return f"r={self.r}"


@dataclass(kw_only=True)
class VeraConfig(LayerConfig):
    r: int = 256
    """Rank of the shared projections. Each unit of it has few parameters, so the default is larger than LoRA's."""
    projection_prng_key: int = 0
    """Seed of the projections."""
    save_projection: bool = True
    """Also write the projections to the file; False: regenerate them from the seed, for a tenth of the file size."""
    vera_dropout: float = 0.0
    """Dropout on the input of the update during training."""
    d_initial: float = 0.1
    """Initial value of d."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""

    peft_type = Name("VERA")
    adapter = VeRA
    learning_rate = 2e-2
    recommended = {"save_projection": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
        check_range(self, 0, 1, "vera_dropout")

    def build_shared(self, targets: Sequence[Target]) -> Projections:
        widest = max(target.in_features for target in targets)
        tallest = max(target.out_features for target in targets)
        shapes = {"vera_A": (self.r, widest), "vera_B": (tallest, self.r)}
        return Projections(shapes, self.projection_prng_key, self.save_projection)
