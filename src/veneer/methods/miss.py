"""MiSS: one small matrix, shared by all shards of the weight, is the whole update.

    W' = W + D^T [I_r I_r ... I_r],  D (r, out): column i of W gets row i mod r of D

Kang and Yin, 2024, arXiv:2409.15371 (versions 1 to 9: Bone, DiSHA). Trainable: r out per target. Mergeable. Starts as a
no-op: D is zero. "mini" repeats a D of (r, mini_r) over the outputs too: r mini_r numbers. "bat" moves each r x r block
of W by the D of its rows: W'_ij = W_ij (I + D_i) + D_i, D (out / r, r, r); it has a weight form only, and no dropout.
Unlike PEFT, GPT-2's Conv1D is a target too. Files of older PEFT, which call the method Bone, are read as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapter import Adapter, LowRank
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError
from ..targets.target import Target


class MiSS(LowRank):
    def __init__(self, config: MissConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.r
        if self.r > target.in_features:
            raise ConfigError(f"r = {self.r} on {target.path!r} must be at most its in = {target.in_features}")
        columns = config.mini_r if config.init_weights == "mini" else target.out_features
        if target.out_features % columns:
            raise ConfigError(f"mini_r = {columns} on {target.path!r} must divide its out = {target.out_features}")
        self.miss_block = nn.Parameter(torch.zeros(self.r, columns))
        if config.init_weights is False:
            nn.init.kaiming_uniform_(self.miss_block, a=math.sqrt(5))
        self.set_dropout(config.miss_dropout)

    def D(self) -> Tensor:
        """(r, out)."""
        return self.miss_block.repeat(1, self.target.out_features // self.miss_block.shape[1])

    def factors(self) -> tuple[Tensor, Tensor]:
        D = self.D()
        shards = math.ceil(self.target.in_features / self.r)
        eye = torch.eye(self.r, device=D.device, dtype=D.dtype)
        return eye.repeat(1, shards)[:, : self.target.in_features], D.T

    def update(self, x: Tensor) -> Tensor:
        x = x if self.dropout is None else self.dropout(x)
        shards = F.pad(x, (0, -x.shape[-1] % self.r)).unflatten(-1, (-1, self.r))
        return shards.sum(-2) @ self.D()

    def expected_parameters(self) -> int:
        return self.r * (self.config.mini_r if self.config.init_weights == "mini" else self.target.out_features)

    def describe(self) -> str:
        return f"r={self.r}, {self.target.in_features} -> {self.target.out_features}"


class Bat(Adapter):
    def __init__(self, config: MissConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.r
        if target.in_features % self.r or target.out_features % self.r:
            raise ConfigError(
                f"r = {self.r} on {target.path!r} must divide its in = {target.in_features} and out = "
                f'{target.out_features}: "bat" moves whole blocks of the weight'
            )
        self.miss_block = nn.Parameter(torch.zeros(target.out_features // self.r, self.r, self.r))

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        D = self.miss_block.to(W.dtype)  # (out / r, r, r)
        rows = W.unflatten(0, (-1, self.r))  # (out / r, r, in)
        shards = rows.unflatten(2, (-1, self.r)).flatten(1, 2)  # (out / r, r in / r, r)
        moved = (shards @ D).view_as(rows) + D.repeat(1, 1, rows.shape[2] // self.r)
        return W + moved.flatten(0, 1), b

    def expected_parameters(self) -> int:
        return self.r * self.target.out_features

    def describe(self) -> str:
        return f"bat, r={self.r}"


@dataclass(kw_only=True)
class MissConfig(LayerConfig):
    r: int = 64
    """Width of a shard: how many columns of the weight are moved independently."""
    miss_dropout: float = 0.0
    """Dropout on the input of the update, in training; not with "bat"."""
    mini_r: int = 1
    """With "mini": how many outputs are moved independently; divides out of every target."""
    init_weights: bool | str = True
    """True: the plain method. "mini", "bat": its variants. False: the plain one from a random start (for tests)."""

    peft_type, adapter = Name("MISS"), MiSS
    aliases, renamed = ("BONE",), {"bone_block": "miss_block"}
    learning_rate = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "mini_r")
        check_range(self, 0, 1, "miss_dropout")
        if self.init_weights not in (True, False, "bat", "mini"):
            raise ConfigError(f'init_weights {self.init_weights!r} is unknown; use True, False, "bat" or "mini"')

    def build(self, target: Target, shared: nn.Module | None = None, **kwargs: Any) -> Adapter:
        return (Bat if self.init_weights == "bat" else MiSS)(self, target, shared)
