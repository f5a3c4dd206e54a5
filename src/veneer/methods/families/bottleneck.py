"""The bottleneck MLP that several methods share, its initialisations and its placements."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...maths.activations import ACTIVATIONS
from ...targets.target import Target

if TYPE_CHECKING:
    from ..bottleneck import BottleneckConfig


def normal_(W: Tensor, last: bool) -> None:
    """Normal with std 0.02."""
    nn.init.normal_(W, std=0.02)


def zero_last_(W: Tensor, last: bool) -> None:
    """Zeros in the last layer, Kaiming uniform in the others."""
    if last:
        nn.init.zeros_(W)
    else:
        nn.init.kaiming_uniform_(W, a=math.sqrt(5))


def truncated_(W: Tensor, last: bool) -> None:
    """Truncated normal, std 0.01, cut at two standard deviations."""
    nn.init.trunc_normal_(W, std=0.01, a=-0.02, b=0.02)


STARTS = {"bert": normal_, "mam_adapter": zero_last_, "houlsby": truncated_}
"""The initialisations of a weight by name; `last` marks the up-projection."""


class Placement(NamedTuple):
    """Where a bottleneck is inserted, and the defaults of the paper that introduced this placement."""

    roles: tuple[str, ...]
    """The roles of the target modules."""
    reduction_factor: int
    non_linearity: str
    scaling: float


PLACEMENTS = {
    "houlsby": Placement(("attention.out", "mlp.out"), 16, "silu", 1.0),
    "pfeiffer": Placement(("mlp.out",), 16, "relu", 1.0),
    "parallel": Placement(("mlp",), 2, "relu", 4.0),
}


class Bottleneck(Adapter):
    """Project down, apply a non-linearity, project up, scale, and add the result to the output."""

    kinds = frozenset({"linear", "block"})

    def __init__(self, config: BottleneckConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        placement = PLACEMENTS[config.placement]
        out = target.out_features
        self.width = self.reads(target)
        self.size = self.rounded(out / (config.reduction_factor or placement.reduction_factor))
        self.function = ACTIVATIONS[config.non_linearity or placement.non_linearity]
        self.adapter_down = self.project(self.width, self.size, last=False)
        self.adapter_up = self.project(self.size, out, last=True)
        self.adapter_norm_before = nn.LayerNorm(self.width) if config.ln_before else None
        self.adapter_norm_after = nn.LayerNorm(out) if config.ln_after else None
        self.dropout = nn.Dropout(config.dropout)
        fixed = placement.scaling if config.scaling is None else config.scaling
        learned = self.learned_scales()
        self.adapter_scaling = nn.Parameter(torch.ones(learned)) if learned else fixed

    def rounded(self, size: float) -> int:
        """The bottleneck's width as a whole number, at least 1."""
        return max(1, int(size))

    def reads(self, target: Target) -> int:
        """The width of the bottleneck's input."""
        return target.out_features

    def project(self, width: int, size: int, last: bool) -> nn.Module:
        """A linear layer from `width` to `size`, initialised according to the config."""
        layer = nn.Linear(width, size)
        start = self.config.init_weights
        if start is True:
            start = "mam_adapter"
        if start:
            STARTS[start](layer.weight, last)
            nn.init.zeros_(layer.bias)
        return layer

    def learned_scales(self) -> int:
        """The number of learned scaling factors."""
        if self.config.scaling == "learned":
            return 1
        if self.config.scaling == "channel":
            return self.target.out_features
        return 0

    def update(self, h: Tensor) -> Tensor:
        """The term that the bottleneck adds to the output, computed from the hidden states h."""
        if self.adapter_norm_before is not None:
            h = self.adapter_norm_before(h)
        hidden = self.function(self.adapter_down(self.dropout(h)))
        out = self.adapter_scaling * self.adapter_up(hidden)
        if self.adapter_norm_after is not None:
            out = self.adapter_norm_after(out)
        return out

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.update(y)

    def expected_parameters(self) -> int:
        config = self.config
        width = self.width
        out = self.target.out_features
        projections = self.size * (width + out + 1) + out
        norms = 2 * width * config.ln_before + 2 * out * config.ln_after
        return projections + norms + self.learned_scales()

    def describe(self) -> str:
        return f"{self.width} -> {self.size} -> {self.target.out_features}"
