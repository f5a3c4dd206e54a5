"""TinyLoRA: learn a few numbers that mix fixed random matrices between the weight's principal directions.

    W' = W + B R A,  R = sum_i v_i P_i,  B = U_r sqrt(S_r),  A = sqrt(S_r) V_r^T  of the SVD of W

The P_i (r, r) are random and frozen. Neighbouring targets may share a v. Morris et al., 2026, arXiv:2602.04118.
Trainable: u numbers per v. Mergeable. Starts as a no-op: v is zero.

As in PEFT's files, the singular values are shared evenly between A and B (all B's in the paper), and A and B are in
the file. On 60 rows of GSM8K 3,840 numbers gain a third of what LoRA gains, 15,360 (r=16, u=256, rate 3e-3) 9 tenths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import LowRank
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError
from ..targets.target import Target
from .inits.pissa import pissa


class Vectors(nn.Module):
    """The learned vectors, and which target uses which."""

    def __init__(self, config: TinyLoraConfig, paths: list[str]) -> None:
        super().__init__()
        self.order = {path: i for i, path in enumerate(paths)}
        self.groups = max(1, round(len(paths) * (1 - config.weight_tying)))
        self.tinylora_v = nn.ParameterDict({str(i): config.start() for i in range(self.groups)})

    def vector(self, path: str) -> Tensor:
        size = len(self.order) // self.groups
        return self.tinylora_v[str(min(self.order[path] // size, self.groups - 1))]


class TinyLoRA(LowRank):
    kinds = frozenset({"linear", "embedding"})

    def __init__(self, config: TinyLoraConfig, target: Target, shared: Vectors | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = min(config.r, target.in_features, target.out_features)
        for name, matrix in zip(("tinylora_A", "tinylora_B"), self.directions(), strict=True):
            self.register_buffer(name, matrix)
        generator = torch.Generator(device="cpu").manual_seed(config.projection_seed + self.shared.order[target.path])
        P = torch.empty(config.u, self.r, self.r, device="cpu").normal_(std=self.r**-0.5, generator=generator)
        self.register_buffer("tinylora_P", P, persistent=config.save_projection)
        self.set_dropout(config.tinylora_dropout)

    @torch.no_grad()
    def directions(self) -> tuple[Tensor, Tensor]:
        """A and B as the file has them: of an embedding's weight as it is stored, (vocabulary, width)."""
        is_embedding, W = self.target.kind == "embedding", self.target.original_weight()
        if torch.empty(0).is_meta:  # the file brings them
            sizes = W.shape[::-1] if not is_embedding else W.shape
            return torch.empty(self.r, sizes[0]), torch.empty(sizes[1], self.r)
        return pissa(W.T if is_embedding else W, self.r, 1.0, "pissa")

    def factors(self) -> tuple[Tensor, Tensor]:
        v = self.shared.vector(self.target.path)
        R = torch.einsum("i,ijk->jk", v, self.tinylora_P.to(v))
        A, B = self.tinylora_A.to(v), self.tinylora_B.to(v)
        return (B.T, (R @ A).T) if self.target.kind == "embedding" else (A, B @ R)

    def update(self, x: Tensor) -> Tensor:
        if self.target.kind != "embedding" or self.dropout is None:
            return super().update(x)
        A, B = self.factors()
        return nn.functional.linear(self.dropout(self.target.op(x, A)), B)

    def expected_parameters(self) -> int:
        return 0

    def describe(self) -> str:
        return f"r={self.r}, u={len(self.tinylora_P)}"


@dataclass(kw_only=True)
class TinyLoraConfig(LayerConfig):
    r: int = 2
    """Rank of the update: how many of W's principal directions it joins."""
    u: int = 64
    """Length of a learned vector."""
    weight_tying: float = 0.0
    """0: each target has a vector of its own; 1: all share one; between: neighbours share."""
    projection_seed: int = 42
    """Seed of the random matrices."""
    save_projection: bool = True
    """Write the random matrices into the file too; False: regenerated from the seed."""
    init_v_bound: float = 0.02
    """Vectors that start uniform lie between minus this and this."""
    tinylora_dropout: float = 0.0
    """Dropout on the input of the update (of an embedding, on what it looks up), in training."""
    init_weights: bool | str = True
    """True: start as a no-op. "uniform": within `init_v_bound`. False: normal (for tests)."""

    peft_type, adapter = Name("TINYLORA"), TinyLoRA
    learning_rate, recommended = 3e-2, {"save_projection": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "u")
        check_range(self, 0, 1, "tinylora_dropout")
        if not 0 <= self.weight_tying <= 1:
            raise ConfigError(f"weight_tying must lie between 0 and 1, not {self.weight_tying}")
        if self.init_weights not in (True, False, "uniform"):
            raise ConfigError(f'init_weights {self.init_weights!r}: use True, False or "uniform"')

    def start(self) -> Tensor:
        """A new vector."""
        v = torch.zeros(self.u) if self.init_weights is True else torch.randn(self.u)
        return v.uniform_(-self.init_v_bound, self.init_v_bound) if self.init_weights == "uniform" else v

    def build_shared(self, targets: Sequence[Target]) -> Vectors:
        return Vectors(self, [target.path for target in targets])
