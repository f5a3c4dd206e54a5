"""RoAd: rotate pairs of output entries by learned angles and scale them.

    y' = R y,  R for a pair (y1, y2):  [ a_1 cos t_1   -b_1 sin u_1 ]
                                       [ b_2 sin u_2    a_2 cos t_2 ]

Liao and Monz, 2024, arXiv:2409.00119. road_1: one length and one angle for each pair; road_2: one of each for each row
of a pair; road_4: all of them independent. Trainable: out, 2 out or 4 out per target. Mergeable. Starts as a no-op:
angles zero, lengths one. As in PEFT's files, a pair takes one entry from each half of a group; in the paper, pairs are
neighbouring entries.
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
"""For each variant, the number of separate values for (cosine and sine, the two rows of a pair)."""


class Road(Adapter):
    def __init__(self, config: RoadConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.variant = config.variant
        self.span = config.group_size // 2
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
        theta = self.road_theta.to(y.dtype).view(shape)
        alpha = self.road_alpha.to(y.dtype).view(shape)
        a = alpha[:, 0]
        b = alpha[:, -1]
        t = theta[:, 0]
        u = theta[:, -1]
        cosines = a * t.cos()
        sines = b * u.sin()
        pairs = y.unflatten(-1, (-1, 2, self.span))  # (..., groups, 2, half)
        y1, y2 = pairs.unbind(-2)
        swapped = torch.stack([-y2, y1], dim=-2)
        turned = pairs * cosines + swapped * sines
        return turned.flatten(-3)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return self.turn(y)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        turned_W = self.turn(W.mT).mT
        turned_b = None if b is None else self.turn(b)
        return turned_W, turned_b

    def expected_parameters(self) -> int:
        return int(self.variant[-1]) * self.target.out_features

    def describe(self) -> str:
        return f"{self.variant}, groups of {2 * self.span}"


@dataclass(kw_only=True)
class RoadConfig(LayerConfig):
    variant: str = "road_1"
    """"road_1": one angle and length per pair; "road_2": one per entry; "road_4": two per entry."""
    group_size: int = 64
    """Even size of the groups whose first half is paired with the second; must divide out of every target."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""

    peft_type = Name("ROAD")
    adapter = Road

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in SHAPES:
            raise ConfigError(f"variant {self.variant!r} is unknown; use one of {', '.join(SHAPES)}")
        if self.group_size < 2 or self.group_size % 2:
            raise ConfigError(f"group_size must be even and at least 2, not {self.group_size}")
