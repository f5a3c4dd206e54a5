"""PEANuT: compute the update of a weight from the frozen weight itself, by a small network.

    W' = W + s B h(W0)^T,  h(W0) = f(W0^T A^T),  A (r, out), B (out, r)

With `depth` > 0, h passes through that many encoders h_i = f(E_i h_{i-1}), then through as many decoders
h = f(D_i h) + h_{i-1}; E_i, D_i (r, r).

Zhong et al., 2024, arXiv:2410.01870. Trainable: 2 r out + 2 depth r^2 per target. Mergeable. Starts as a no-op: B is
zero. The network always reads the pretrained weight, even when other adapters are active or merged. On activations it
is a LoRA with A = h(W0)^T. Unlike in PEFT, GPT-2's Conv1D can be a target; the trainable activation "xielu" is not
supported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapter import LowRank
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError, nearest
from ..maths.activations import ACTIVATIONS
from ..targets.target import Matrix, Target


class PEANuT(LowRank):
    def __init__(self, config: PeanutConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.r
        self.scaling = config.scaling
        self.function = ACTIVATIONS[config.act_fn]
        self.peanut_A = Matrix(self.r, target.out_features)
        self.peanut_B = Matrix(target.out_features, self.r)
        self.peanut_encoders = nn.ModuleList()
        self.peanut_decoders = nn.ModuleList()
        for _ in range(config.depth):
            self.peanut_encoders.append(Matrix(self.r, self.r))
            self.peanut_decoders.append(Matrix(self.r, self.r))
        for weight in self.parameters():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(self.peanut_B.weight)

    def hidden(self) -> Tensor:
        """h(W0), (in, r)."""
        A = self.peanut_A.weight
        W0 = self.target.original_weight().to(A.dtype)
        h = self.function(F.linear(W0.T, A))
        residuals = []
        for E in self.peanut_encoders.parameters():
            residuals.append(h)
            h = self.function(F.linear(h, E))
        for D, residual in zip(self.peanut_decoders.parameters(), reversed(residuals), strict=True):
            h = self.function(F.linear(h, D)) + residual
        return h

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.hidden().T, self.peanut_B.weight * self.scaling

    def expected_parameters(self) -> int:
        return 2 * self.r * (self.target.out_features + self.config.depth * self.r)

    def describe(self) -> str:
        return f"r={self.r}, depth={self.config.depth}, {self.config.act_fn}"


@dataclass(kw_only=True)
class PeanutConfig(LayerConfig):
    r: int = 32
    """Width of the network, and rank of the update."""
    depth: int = 0
    """Number of encoders, and of decoders, between A and B."""
    act_fn: str = "relu"
    """The activation f, by its name in transformers."""
    scaling: float = 1.0
    """s: the factor by which the update is multiplied."""
    init_weights: bool = True
    """Start as a no-op; False: B is random too (for tests)."""

    peft_type = Name("PEANUT")
    adapter = PEANuT
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
        check_range(self, 0, 1000, "depth")
        known = ACTIVATIONS.keys() - {"leakyrelu"}  # AdapterHub's spelling, unknown to PEFT
        if self.act_fn not in known:
            raise ConfigError(f"act_fn {self.act_fn!r} is not a supported activation{nearest(self.act_fn, known)}")
