"""RoAd: turn pairs of the output's entries by learned angles, and stretch them.

    y' = R y,  R for a pair (y1, y2):  [ a_1 cos t_1   -b_1 sin u_1 ]
                                       [ b_2 sin u_2    a_2 cos t_2 ]

Liao and Monz, 2024, arXiv:2409.00119. All a = b and t = u within a pair: road_1; within a row: road_2; none: road_4.
Trainable: out, 2 out or 4 out per target. Mergeable. Starts as a no-op: angles zero, lengths one. The pairs are, as in
PEFT's files, the two halves of each group of entries; the paper's are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name
from ..errors import ConfigError
from ..targets.target import Target

SHAPES = {"road_1": (1, 1), "road_2": (1, 2), "road_4": (2, 2)}
"""For each variant how many values of their own (the cosines and the sines, the two rows) have."""


class Road(Adapter):
    def __init__(self, config: RoadConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.variant, self.span = config.variant, config.group_size // 2
        if target.out_features % config.group_size:
            raise ConfigError(
                f"group_size {config.group_size} on {target.path!r} must divide its out = {target.out_features}"
            )
        columns, rows = SHAPES[self.variant]
        size = columns * rows * target.out_features // 2
        self.road_theta = nn.Parameter(torch.zeros(size))
        self.road_alpha = nn.Parameter(torch.ones(size))
        if not config.init_weights:
            nn.init.normal_(self.road_theta, std=0.5)
            nn.init.normal_(self.road_alpha, mean=1, std=0.5)

    def turn(self, y: Tensor) -> Tensor:
        """R y for y (..., out)."""
        shape = (-1, *SHAPES[self.variant], self.span)  # (groups, columns, rows, half)
        theta, alpha = (p.to(y.dtype).view(shape) for p in (self.road_theta, self.road_alpha))
        cosines, sines = alpha[:, 0] * theta[:, 0].cos(), alpha[:, -1] * theta[:, -1].sin()
        pairs = y.unflatten(-1, (-1, 2, self.span))
        y1, y2 = pairs.unbind(-2)
        return (pairs * cosines + torch.stack([-y2, y1], dim=-2) * sines).flatten(-3)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return self.turn(y)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.turn(W.mT).mT, None if b is None else self.turn(b)

    def expected_parameters(self) -> int:
        return int(self.variant[-1]) * self.target.out_features

    def describe(self) -> str:
        return f"{self.variant}, groups of {2 * self.span}"


@dataclass(kw_only=True)
class RoadConfig(LayerConfig):
    variant: str = "road_1"
    """"road_1": one angle and length for a pair; "road_2": for each entry; "road_4": two for each entry."""
    group_size: int = 64
    """Entries are paired within groups of this even size, first half with second; it divides out of every target."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""

    peft_type, adapter = Name("ROAD"), Road

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in SHAPES:
            raise ConfigError(f"variant {self.variant!r} is unknown; use one of {', '.join(SHAPES)}")
        if self.group_size < 2 or self.group_size % 2:
            raise ConfigError(f"group_size must be even and at least 2, not {self.group_size}")
