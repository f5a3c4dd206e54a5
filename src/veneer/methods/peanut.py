"""PEANuT: a small network reads the frozen weight and writes the update.

    W' = W + s B h(W0)^T,  h(W0) = f(W0^T A^T),  A (r, out), B (out, r)

With `depth`, h goes through as many layers h_i = f(E_i h_{i-1}) and back by h = f(D_i h) + h_{i-1}; E_i, D_i (r, r).

Zhong et al., 2024, arXiv:2410.01870. Trainable: 2 r out + 2 depth r^2 per target. Mergeable. Starts as a no-op: B is
zero. The network reads the pretrained weight, whatever other adapters are active or merged. On activations it is a
LoRA with A = h(W0)^T. Unlike PEFT, GPT-2's Conv1D is a target too; "xielu", an activation that learns, is not one here.
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
        self.r, self.scaling, self.function = config.r, config.scaling, ACTIVATIONS[config.act_fn]
        self.peanut_A, self.peanut_B = Matrix(self.r, target.out_features), Matrix(target.out_features, self.r)
        self.peanut_encoders = nn.ModuleList(Matrix(self.r, self.r) for _ in range(config.depth))
        self.peanut_decoders = nn.ModuleList(Matrix(self.r, self.r) for _ in range(config.depth))
        for weight in self.parameters():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(self.peanut_B.weight)

    def hidden(self) -> Tensor:
        """h(W0), (in, r)."""
        A = self.peanut_A.weight
        h = self.function(F.linear(self.target.original_weight().T.to(A.dtype), A))
        seen = []
        for E in self.peanut_encoders.parameters():
            seen.append(h)
            h = self.function(F.linear(h, E))
        for D, before in zip(self.peanut_decoders.parameters(), reversed(seen), strict=True):
            h = self.function(F.linear(h, D)) + before
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
    """Layers down, and as many back, between A and B."""
    act_fn: str = "relu"
    """The activation, by the name it has in transformers."""
    scaling: float = 1.0
    """Strength of the update: a factor."""
    init_weights: bool = True
    """Start as a no-op; False: B random too (for tests)."""

    peft_type, adapter = Name("PEANUT"), PEANuT
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
        check_range(self, 0, 1000, "depth")
        known = ACTIVATIONS.keys() - {"leakyrelu"}  # AdapterHub's spelling, which PEFT does not read
        if self.act_fn not in known:
            raise ConfigError(f"act_fn {self.act_fn!r} is not an activation here{nearest(self.act_fn, known)}")
