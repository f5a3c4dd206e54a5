"""MiSS: the update is one small matrix, repeated over all shards of the weight.

    W' = W + D^T [I_r I_r ... I_r],  D (r, out): row i mod r of D is added to column i of W

Kang and Yin, 2024, arXiv:2409.15371 (versions 1 to 9: Bone, DiSHA). Trainable: r out per target. Mergeable. Starts as a
no-op: D is zero. With "mini", D (r, mini_r) is also repeated over the outputs; trainable: r mini_r. With "bat", each
r x r block of W is updated by the D of its block of rows: W'_ij = W_ij (I + D_i) + D_i, D (out / r, r, r); this variant
is computed on the weight only and has no dropout. Unlike in PEFT, GPT-2's Conv1D can be a target. Files of older PEFT
versions, which call the method Bone, load unchanged.
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
        in_features = target.in_features
        out_features = target.out_features
        if self.r > in_features:
            raise ConfigError(f"r = {self.r} on {target.path!r} must be at most its in = {in_features}")
        columns = config.mini_r if config.init_weights == "mini" else out_features
        if out_features % columns:
            raise ConfigError(f"mini_r = {columns} on {target.path!r} must divide its out = {out_features}")
        self.miss_block = nn.Parameter(torch.zeros(self.r, columns))
        if config.init_weights is False:
            nn.init.kaiming_uniform_(self.miss_block, a=math.sqrt(5))
        self.set_dropout(config.miss_dropout)

    def D(self) -> Tensor:
        """(r, out)."""
        copies = self.target.out_features // self.miss_block.shape[1]
        return self.miss_block.repeat(1, copies)

    def factors(self) -> tuple[Tensor, Tensor]:
        D = self.D()
        in_features = self.target.in_features
        shards = math.ceil(in_features / self.r)
        eye = torch.eye(self.r, device=D.device, dtype=D.dtype)
        A = eye.repeat(1, shards)[:, :in_features]
        return A, D.T

    def term(self, x: Tensor) -> Tensor:
        if self.dropout is not None:
            x = self.dropout(x)
        padding = -x.shape[-1] % self.r
        padded = F.pad(x, (0, padding))
        shards = padded.unflatten(-1, (-1, self.r))  # (..., shards, r)
        return shards.sum(-2) @ self.D()

    def expected_parameters(self) -> int:
        is_mini = self.config.init_weights == "mini"
        columns = self.config.mini_r if is_mini else self.target.out_features
        return self.r * columns

    def describe(self) -> str:
        return f"r={self.r}, {self.target.in_features} -> {self.target.out_features}"


class Bat(Adapter):
    """The variant "bat": W'_ij = W_ij (I + D_i) + D_i for each r x r block of W."""

    def __init__(self, config: MissConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.r
        in_features = target.in_features
        out_features = target.out_features
        if in_features % self.r or out_features % self.r:
            raise ConfigError(
                f"r = {self.r} on {target.path!r} must divide its in = {in_features} and out = {out_features}: "
                '"bat" moves whole blocks of the weight'
            )
        blocks = out_features // self.r
        self.miss_block = nn.Parameter(torch.zeros(blocks, self.r, self.r))

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        D = self.miss_block.to(W.dtype)  # (out / r, r, r)
        rows = W.unflatten(0, (-1, self.r))  # (out / r, r, in)
        shards = rows.unflatten(2, (-1, self.r)).flatten(1, 2)  # (out / r, r in / r, r)
        product = (shards @ D).view_as(rows)
        repeated = D.repeat(1, 1, rows.shape[2] // self.r)  # (out / r, r, in)
        update = product + repeated
        return W + update.flatten(0, 1), b

    def expected_parameters(self) -> int:
        return self.r * self.target.out_features

    def describe(self) -> str:
        return f"bat, r={self.r}"


@dataclass(kw_only=True)
class MissConfig(LayerConfig):
    r: int = 64
    """Width of a shard: the number of columns of the weight that are updated independently."""
    miss_dropout: float = 0.0
    """Dropout on the input of the update during training; no effect with "bat"."""
    mini_r: int = 1
    """With "mini": number of outputs that are updated independently; must divide the output size of every target."""
    init_weights: bool | str = True
    """True: the plain method. "mini", "bat": its variants. False: the plain method with a random start (for tests)."""

    peft_type = Name("MISS")
    adapter = MiSS
    aliases = ("BONE",)
    renamed = {"bone_block": "miss_block"}
    learning_rate = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "mini_r")
        check_range(self, 0, 1, "miss_dropout")
        if self.init_weights not in (True, False, "bat", "mini"):
            raise ConfigError(f'init_weights {self.init_weights!r} is unknown; use True, False, "bat" or "mini"')

    def build(self, target: Target, shared: nn.Module | None = None, **kwargs: Any) -> Adapter:
        adapter_class = Bat if self.init_weights == "bat" else MiSS
        return adapter_class(self, target, shared)
