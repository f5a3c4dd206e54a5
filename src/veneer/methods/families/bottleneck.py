"""What bottleneck adapters share: the small MLP, its starts, and where each placement puts it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...maths.activations import ACTIVATIONS
from ...targets.target import Target

if TYPE_CHECKING:
    from ..bottleneck import BottleneckConfig


def normal_(W: Tensor, last: bool) -> None:
    nn.init.normal_(W, std=0.02)


def zero_last_(W: Tensor, last: bool) -> None:
    if last:
        nn.init.zeros_(W)
    else:
        nn.init.kaiming_uniform_(W, a=math.sqrt(5))


def truncated_(W: Tensor, last: bool) -> None:
    """Within two standard deviations of a hundredth."""
    nn.init.trunc_normal_(W, std=0.01, a=-0.02, b=0.02)


STARTS = {"bert": normal_, "mam_adapter": zero_last_, "houlsby": truncated_}


PLACEMENTS = {
    "houlsby": (("attention.out", "mlp.out"), 16, "silu", 1.0),
    "pfeiffer": (("mlp.out",), 16, "relu", 1.0),
    "parallel": (("mlp",), 2, "relu", 4.0),
}
"""What each stands behind or beside, and its paper's reduction factor, function and scaling."""


class Bottleneck(Adapter):
    kinds = frozenset({"linear", "block"})

    def __init__(self, config: BottleneckConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        _, reduction, function, scaling = PLACEMENTS[config.placement]
        self.width, out = self.reads(target), target.out_features
        self.size = self.rounded(out / (config.reduction_factor or reduction))
        self.function = ACTIVATIONS[config.non_linearity or function]
        self.adapter_down = self.project(self.width, self.size, last=False)
        self.adapter_up = self.project(self.size, out, last=True)
        self.adapter_norm_before = nn.LayerNorm(self.width) if config.ln_before else None
        self.adapter_norm_after = nn.LayerNorm(out) if config.ln_after else None
        self.dropout = nn.Dropout(config.dropout)
        learned = {"learned": (1,), "channel": (out,)}.get(config.scaling)  # type: ignore[arg-type]
        fixed = scaling if config.scaling is None else config.scaling
        self.adapter_scaling = fixed if learned is None else nn.Parameter(torch.ones(learned))

    def rounded(self, size: float) -> int:
        return max(1, int(size))

    def reads(self, target: Target) -> int:
        return target.out_features

    def project(self, width: int, size: int, last: bool) -> nn.Module:
        layer, how = nn.Linear(width, size), self.config.init_weights
        if how:
            STARTS["mam_adapter" if how is True else how](layer.weight, last)
            nn.init.zeros_(layer.bias)
        return layer

    def update(self, h: Tensor) -> Tensor:
        """What it adds to the output."""
        h = self.adapter_norm_before(h) if self.adapter_norm_before else h
        out = self.adapter_scaling * self.adapter_up(self.function(self.adapter_down(self.dropout(h))))
        return self.adapter_norm_after(out) if self.adapter_norm_after else out

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.update(y)

    def expected_parameters(self) -> int:
        config, width, out = self.config, self.width, self.target.out_features
        norms = 2 * width * config.ln_before + 2 * out * config.ln_after
        return self.size * (width + out + 1) + out + norms + {"learned": 1, "channel": out}.get(config.scaling, 0)

    def describe(self) -> str:
        return f"{self.width} -> {self.size} -> {self.target.out_features}"
