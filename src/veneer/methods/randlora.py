"""RandLoRA: a full-rank update from many frozen random low-rank bases with learned diagonal scales.

    W' = W + s sum_j B_j diag(l_j) A diag(g_j),  s = alpha / r,  for j = 1 ... n,  n = ceil(min(in, out) / r)

A (r, min) and B_j (max, r) are random, frozen, and sliced from one shared set to each target's size; if in > out, the
sum is transposed. Albert et al., 2025, arXiv:2502.00987. Trainable: n (r + min(in, out)) per target. Mergeable. Starts
as a no-op: l is zero.

As in PEFT, the columns of [B_1 ... B_n] are paired with the scaled rows of A in an order in which j varies fastest,
which only relabels the random columns. PEFT draws the bases in bf16, but in fp16 on machines without bf16; files from
such machines agree with ours only if they hold the bases. As in PEFT's files, the bases are repeated for every layer.
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
    """The shared A (r, 1, smallest) and B (largest, n, r), with standard deviation 1."""

    def __init__(self, config: RandLoraConfig, smallest: int, largest: int) -> None:
        super().__init__()
        r = config.r
        n = math.ceil(smallest / r)
        generator = torch.Generator(device="cpu").manual_seed(config.projection_prng_key)
        if config.sparse or config.very_sparse:
            sparsity = math.sqrt(smallest) if config.very_sparse else 3
            A = ternary(r, 1, smallest, generator=generator, sparsity=sparsity)
            B = ternary(largest, n, r, generator=generator, sparsity=sparsity)
            if not (A.any() and B.any()):
                raise ConfigError("the sparse bases are all zero; use a larger r or another projection_prng_key")
        else:
            draw = partial(kaiming, generator=generator, a=math.sqrt(5), dtype=torch.bfloat16)
            A = draw(r, 1, smallest)
            B = torch.cat([draw(largest, 1, r) for _ in range(n)], dim=1)
        A = (A / A.std()).float()
        B = (B / B.std()).float()
        self.register_buffer("randlora_A", A, persistent=config.save_projection)
        self.register_buffer("randlora_B", B, persistent=config.save_projection)


class RandLoRA(LowRank):
    def __init__(self, config: RandLoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.r
        self.smaller = min(target.in_features, target.out_features)
        self.larger = max(target.in_features, target.out_features)
        self.n = math.ceil(self.smaller / self.r)
        self.scaling = config.randlora_alpha / self.r
        if config.init_weights:
            scales = torch.zeros(self.r, self.n)
            gamma = 1 / self.smaller
        else:
            scales = torch.randn(self.r, self.n)
            gamma = 1 / self.larger
        self.randlora_lambda = nn.Parameter(scales)
        self.randlora_gamma = nn.Parameter(torch.full((self.n, self.smaller), gamma))
        self.set_dropout(config.randlora_dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        scales = self.randlora_lambda  # (r, n)
        A = self.shared.randlora_A[..., : self.smaller].to(scales)  # (r, 1, min)
        B = self.shared.randlora_B[: self.larger, : self.n].to(A)  # (max, n, r)
        B = B.flatten(1) * self.scaling  # (max, n r)
        A = scales[..., None] * A * self.randlora_gamma  # (r, n, min)
        A = A.flatten(0, 1)  # (r n, min)
        if self.smaller == self.target.in_features:
            return A, B
        return B.T, A.T

    def export(self) -> Tensors:
        return self.state_dict() | self.shared.state_dict()

    def expected_parameters(self) -> int:
        return self.n * (self.r + self.smaller)

    def describe(self) -> str:
        return f"{self.n} bases of r={self.r}"


@dataclass(kw_only=True)
class RandLoraConfig(LayerConfig):
    r: int = 32
    """Rank of each base. A smaller rank needs more bases, and so more parameters."""
    projection_prng_key: int = 0
    """Seed of the bases."""
    save_projection: bool = True
    """Also write the bases to the file; False: regenerate them from the seed."""
    sparse: bool = False
    """Bases of -1, 0 and 1, two thirds of the entries zero."""
    very_sparse: bool = False
    """Bases of -1, 0 and 1, with a share of 1 / sqrt(smaller width) nonzero; takes precedence over `sparse`."""
    randlora_dropout: float = 0.0
    """Dropout on the input of the update during training."""
    randlora_alpha: int | float = 640
    """Strength of the update, which is scaled by randlora_alpha / r; about 20 r is suitable."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""

    peft_type = Name("RANDLORA")
    adapter = RandLoRA
    recommended = {"save_projection": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
        check_range(self, 0, 1, "randlora_dropout")

    def build_shared(self, targets: Sequence[Target]) -> Bases:
        widest = max(target.in_features for target in targets)
        tallest = max(target.out_features for target in targets)
        return Bases(self, min(widest, tallest), max(widest, tallest))
