"""GraLoRA: split the weight into k x k blocks and learn a separate low-rank update for each.

    W' = W + s [B_ij A_ij],  A_ij (r / k, in / k), B_ij (out / k, r / k),  s = alpha / (r + hybrid_r)

Jung et al., 2025, arXiv:2505.20355. Trainable: r (in + out) per target, as for LoRA, for an update of rank up to k r.
Mergeable. Starts as a no-op: the B_ij are zero. `hybrid_r` adds a plain LoRA of that rank. In the file, A has shape
(k, in / k, r) and holds for each input block j the A_ij of all output blocks i, concatenated; B has shape
(k, r, out / k) and holds for each output block i the B_ij of all input blocks j, concatenated. Unlike in PEFT, the
blocks and the plain LoRA use the same dropout mask.
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
        self.r = config.r
        self.k = config.gralora_k
        self.hybrid_r = config.hybrid_r
        self.scaling = config.alpha / (self.r + self.hybrid_r)
        in_features = target.in_features
        out_features = target.out_features
        if in_features % self.k or out_features % self.k:
            raise ConfigError(
                f"gralora_k = {self.k} on {target.path!r} must divide its in = {in_features} and out = {out_features}"
            )
        block_in = in_features // self.k
        block_out = out_features // self.k
        self.gralora_A = nn.Parameter(torch.empty(self.k, block_in, self.r))
        self.gralora_B = nn.Parameter(torch.zeros(self.k, self.r, block_out))
        if self.hybrid_r:
            self.gralora_A_general, self.gralora_B_general = target.factors(self.hybrid_r)
            nn.init.zeros_(self.gralora_B_general.weight)
        self.initialise(config.init_weights)
        self.set_dropout(config.gralora_dropout)

    def initialise(self, as_no_op: bool) -> None:
        in_features = self.target.in_features
        uniform_(self.gralora_A, in_features // self.k)
        if not as_no_op:
            uniform_(self.gralora_B, self.r)
        if self.hybrid_r:
            uniform_(self.gralora_A_general.weight, in_features)
            if not as_no_op:
                uniform_(self.gralora_B_general.weight, self.hybrid_r)

    def factors(self) -> tuple[Tensor, Tensor]:
        A = torch.block_diag(*self.gralora_A.mT)  # (k r, in)
        blocks = self.gralora_B.unflatten(1, (self.k, -1))  # (i, j, r / k, out / k)
        eye = torch.eye(self.k, device=A.device, dtype=A.dtype)
        spread = torch.einsum("ijso,il->iojls", blocks, eye)  # (i, out / k, j, l, r / k), zero unless l = i
        B = spread.flatten(2).flatten(0, 1)  # (out, k r)
        if self.hybrid_r:
            A = torch.cat([A, self.gralora_A_general.weight])
            B = torch.cat([B, self.gralora_B_general.weight], dim=1)
        return A, B * self.scaling

    def term(self, x: Tensor) -> Tensor:
        if self.dropout is not None:
            x = self.dropout(x)
        x_blocks = x.unflatten(-1, (self.k, -1))  # (..., j, in / k)
        hidden = torch.einsum("...jc,jcr->...jr", x_blocks, self.gralora_A)
        hidden = hidden.unflatten(-1, (self.k, -1))  # (..., j, i, r / k)
        hidden = hidden.transpose(-3, -2)  # (..., i, j, r / k)
        hidden = hidden.flatten(-2)  # (..., i, r)
        y = torch.einsum("...ir,iro->...io", hidden, self.gralora_B)
        y = y.flatten(-2)
        if self.hybrid_r:
            A = self.gralora_A_general.weight
            B = self.gralora_B_general.weight
            y = y + self.target.low_rank(x, A, B)
        return y * self.scaling

    def expected_parameters(self) -> int:
        rank = self.r + self.hybrid_r
        return rank * (self.target.in_features + self.target.out_features)

    def describe(self) -> str:
        hybrid = f" + {self.hybrid_r}" if self.hybrid_r else ""
        block_rank = self.r // self.k
        return f"{self.k} x {self.k} blocks of r={block_rank}{hybrid}, scaling={self.scaling:g}"


def uniform_(parameter: Tensor, fan_in: int) -> None:
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(parameter, -bound, bound)


@dataclass(kw_only=True)
class GraloraConfig(LayerConfig):
    r: int = 32
    """Sets the number of parameters, as LoRA's rank does; each block has rank r / gralora_k."""
    hybrid_r: int = 0
    """Rank of a plain LoRA that is added to the blocks; 0: none."""
    alpha: int | float = 64
    """Strength of the update: it is scaled by alpha / (r + hybrid_r)."""
    gralora_dropout: float = 0.0
    """Dropout on the input of the update during training."""
    gralora_k: int = 2
    """Number of blocks along each side; must divide r and both sizes of every target. The paper uses 2 up to r = 32,
    and 4 from r = 64."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""

    peft_type = Name("GRALORA")
    adapter = GraLoRA
    learning_rate = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "gralora_k")
        check_range(self, 0, math.inf, "hybrid_r")
        check_range(self, 0, 1, "gralora_dropout")
        if self.r % self.gralora_k:
            raise ConfigError(f"gralora_k must divide r: {self.gralora_k} does not divide {self.r}")
