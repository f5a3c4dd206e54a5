"""GraLoRA: cut the weight into k x k blocks and give each a low-rank update of its own.

    W' = W + s [B_ij A_ij],  A_ij (r / k, in / k), B_ij (out / k, r / k),  s = alpha / (r + hybrid_r)

Jung et al., 2025, arXiv:2505.20355. Trainable: r (in + out) per target, as LoRA, for a rank of up to k r. Mergeable.
Starts as a no-op: the B_ij are zero. `hybrid_r` adds a plain LoRA of that rank. In the file A (k, in / k, r) holds for
each block of inputs j the A_ij of all blocks of outputs i side by side, and B (k, r, out / k) for each i the B_ij of
all j. Unlike PEFT, both parts see the same dropout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import LowRank
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError
from ..targets.target import Target


class GraLoRA(LowRank):
    def __init__(self, config: GraloraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r, self.k, self.hybrid_r = config.r, config.gralora_k, config.hybrid_r
        self.scaling = config.alpha / (self.r + self.hybrid_r)
        in_features, out_features = target.in_features, target.out_features
        if in_features % self.k or out_features % self.k:
            raise ConfigError(
                f"gralora_k = {self.k} on {target.path!r} must divide its in = {in_features} and out = {out_features}"
            )
        self.gralora_A = nn.Parameter(torch.empty(self.k, in_features // self.k, self.r))
        self.gralora_B = nn.Parameter(torch.zeros(self.k, self.r, out_features // self.k))
        starts = [(self.gralora_A, in_features // self.k), (self.gralora_B, self.r)]
        if self.hybrid_r:
            self.gralora_A_general, self.gralora_B_general = target.factors(self.hybrid_r)
            nn.init.zeros_(self.gralora_B_general.weight)
            starts += [(self.gralora_A_general.weight, in_features), (self.gralora_B_general.weight, self.hybrid_r)]
        for parameter, fan_in in starts[::2] if config.init_weights else starts:
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        self.set_dropout(config.gralora_dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        A = torch.block_diag(*self.gralora_A.mT)  # (k r, in)
        blocks = self.gralora_B.unflatten(1, (self.k, -1))  # (i, j, r / k, out / k)
        eye = torch.eye(self.k, device=A.device, dtype=A.dtype)
        B = torch.einsum("ijso,il->iojls", blocks, eye).flatten(2).flatten(0, 1)  # (out, k r)
        if self.hybrid_r:
            A = torch.cat([A, self.gralora_A_general.weight])
            B = torch.cat([B, self.gralora_B_general.weight], dim=1)
        return A, B * self.scaling

    def update(self, x: Tensor) -> Tensor:
        x = x if self.dropout is None else self.dropout(x)
        hidden = torch.einsum("...jc,jcr->...jr", x.unflatten(-1, (self.k, -1)), self.gralora_A)
        hidden = hidden.unflatten(-1, (self.k, -1)).transpose(-3, -2).flatten(-2)  # from (j, i, s) to (i, j s)
        y = torch.einsum("...ir,iro->...io", hidden, self.gralora_B).flatten(-2)
        if self.hybrid_r:
            y = y + self.target.low_rank(x, self.gralora_A_general.weight, self.gralora_B_general.weight)
        return y * self.scaling

    def expected_parameters(self) -> int:
        return (self.r + self.hybrid_r) * (self.target.in_features + self.target.out_features)

    def describe(self) -> str:
        hybrid = f" + {self.hybrid_r}" if self.hybrid_r else ""
        return f"{self.k} x {self.k} blocks of r={self.r // self.k}{hybrid}, scaling={self.scaling:g}"


@dataclass(kw_only=True)
class GraloraConfig(LayerConfig):
    r: int = 32
    """Sets the parameters, as LoRA's rank does; each block's rank is r / gralora_k."""
    hybrid_r: int = 0
    """Rank of a plain LoRA beside the blocks; 0: none."""
    alpha: int | float = 64
    """Strength of the update: it is scaled by alpha / (r + hybrid_r)."""
    gralora_dropout: float = 0.0
    """Dropout on the input of the update, in training."""
    gralora_k: int = 2
    """Blocks along each side; divides r and both sides of every target. The paper: 2 up to r = 32, 4 from 64 on."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""

    peft_type, adapter = Name("GRALORA"), GraLoRA
    learning_rate = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "gralora_k")
        check_range(self, 0, math.inf, "hybrid_r")
        check_range(self, 0, 1, "gralora_dropout")
        if self.r % self.gralora_k:
            raise ConfigError(f"gralora_k must divide r: {self.gralora_k} does not divide {self.r}")
