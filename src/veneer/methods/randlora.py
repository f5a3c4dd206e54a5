"""RandLoRA: a full-rank update from many random low-rank bases, of which only diagonal scales are learned.

    W' = W + s sum_j B_j diag(l_j) A diag(g_j),  s = alpha / r,  for j = 1 ... n,  n = ceil(min(in, out) / r)

A (r, min) and B_j (max, r) are random, frozen, cut from one set to each target's size; where in > out, the sum is
transposed. Albert et al., 2025, arXiv:2502.00987. Trainable: n (r + min(in, out)) per target. Mergeable. Starts as a
no-op: l is zero.

As in PEFT's files, the columns of [B_1 ... B_n] in order meet the scaled rows of A in the order that counts j first: a
relabelling of the random columns. PEFT draws the bases in bf16 (on machines without it in fp16, whose files agree only
when they hold the bases). Its files repeat the bases at every layer, and so do ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..core.adapter import LowRank, Tensors
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError
from ..maths.bases import kaiming, ternary
from ..targets.target import Target


class Bases(nn.Module):
    """The shared A (r, 1, smallest) and B (largest, n, r), of standard deviation one."""

    def __init__(self, config: RandLoraConfig, smallest: int, largest: int) -> None:
        super().__init__()
        r, n = config.r, math.ceil(smallest / config.r)
        generator = torch.Generator(device="cpu").manual_seed(config.projection_prng_key)
        if config.sparse or config.very_sparse:
            sparsity = math.sqrt(smallest) if config.very_sparse else 3
            A = ternary(r, 1, smallest, generator=generator, sparsity=sparsity)
            B = ternary(largest, n, r, generator=generator, sparsity=sparsity)
            if not (A.any() and B.any()):
                raise ConfigError("the sparse bases came out all zero; use a larger r or another projection_prng_key")
        else:
            draw = partial(kaiming, generator=generator, a=math.sqrt(5), dtype=torch.bfloat16)
            A, B = draw(r, 1, smallest), torch.cat([draw(largest, 1, r) for _ in range(n)], dim=1)
        A, B = (A / A.std()).float(), (B / B.std()).float()
        self.register_buffer("randlora_A", A, persistent=config.save_projection)
        self.register_buffer("randlora_B", B, persistent=config.save_projection)


class RandLoRA(LowRank):
    def __init__(self, config: RandLoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r, sizes = config.r, (target.in_features, target.out_features)
        self.smaller, self.larger = min(sizes), max(sizes)
        self.n, self.scaling = math.ceil(self.smaller / self.r), config.randlora_alpha / self.r
        values, start = (torch.zeros, 1 / self.smaller) if config.init_weights else (torch.randn, 1 / self.larger)
        self.randlora_lambda = nn.Parameter(values(self.r, self.n))
        self.randlora_gamma = nn.Parameter(torch.full((self.n, self.smaller), start))
        self.set_dropout(config.randlora_dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        A = self.shared.randlora_A[..., : self.smaller].to(self.randlora_lambda)  # (r, 1, min)
        B = self.shared.randlora_B[: self.larger, : self.n].to(A).flatten(1) * self.scaling  # (max, n r)
        A = (self.randlora_lambda[..., None] * A * self.randlora_gamma).flatten(0, 1)  # (r n, min)
        return (A, B) if self.smaller == self.target.in_features else (B.T, A.T)

    def export(self) -> Tensors:
        return self.state_dict() | self.shared.state_dict()

    def expected_parameters(self) -> int:
        return self.n * (self.r + self.smaller)

    def describe(self) -> str:
        return f"{self.n} bases of r={self.r}"


@dataclass(kw_only=True)
class RandLoraConfig(LayerConfig):
    r: int = 32
    """Rank of one base. A smaller rank takes more bases, and so more parameters."""
    projection_prng_key: int = 0
    """Seed of the bases."""
    save_projection: bool = True
    """Write the bases into the file too; False: regenerated from the seed."""
    sparse: bool = False
    """Bases of -1, 0 and 1, two thirds of them zero."""
    very_sparse: bool = False
    """The same, with a share of 1 / sqrt(the smaller width) that is not zero; goes before `sparse`."""
    randlora_dropout: float = 0.0
    """Dropout on the input of the update, in training."""
    randlora_alpha: int | float = 640
    """Strength of the update: it is scaled by randlora_alpha / r; about 20 r."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""

    peft_type, adapter = Name("RANDLORA"), RandLoRA
    recommended = {"save_projection": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
        check_range(self, 0, 1, "randlora_dropout")

    def build_shared(self, targets: Sequence[Target]) -> Bases:
        widest = max(target.in_features for target in targets)
        tallest = max(target.out_features for target in targets)
        return Bases(self, min(widest, tallest), max(widest, tallest))
