"""BD-LoRA: one of the two factors is block-diagonal, so that a model sharded over devices needs no exchange for it.

    W' = W + s B A,  A = diag(A_1 ... A_n) or B = diag(B_1 ... B_n), by target

Wang et al., 2025, arXiv:2510.23346. Trainable: r (in / n + out) or r (in + out / n) per target. Mergeable. Starts as a
no-op: B is zero. The file holds the blocks one below the other: lora_A (r, in / n), lora_B (out, r / n).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.config import check_range
from ..errors import ConfigError, TargetError
from ..targets.target import Matrix
from .families.variants import Composition, Settings
from .lora import LoRA, LoraConfig


@dataclass(kw_only=True)
class BdLoraConfig(Settings):
    target_modules_bd_a: list[str] | None = None
    """Parts of the names of targets whose A is block-diagonal (those sharded by rows: o_proj, down_proj)."""
    target_modules_bd_b: list[str] | None = None
    """The same for B (those sharded by columns: q_proj, up_proj)."""
    nblocks: int = 1
    """n: blocks, as many as shards."""
    match_strict: bool = True
    """Each target must be named by one of the two; otherwise the rest are plain LoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "nblocks")
        both = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        if both:
            raise ConfigError(f"target_modules_bd_a and target_modules_bd_b both name {', '.join(sorted(both))}")

    def sides(self, path: str) -> str:
        """Which factor of a target is block-diagonal: "A", "B" or ""."""
        named = {"A": self.target_modules_bd_a, "B": self.target_modules_bd_b}
        found = "".join(side for side, names in named.items() if any(name in path for name in names or ()))
        if len(found) == 2:
            raise TargetError(f"use_bdlora: {path!r} is named by both target_modules_bd_a and target_modules_bd_b")
        if not found and self.match_strict:
            raise TargetError(
                f"use_bdlora: {path!r} is named by neither target_modules_bd_a nor target_modules_bd_b; name it, or "
                "set match_strict=False to give it plain LoRA"
            )
        return found


class BDLoRA(LoRA):
    kinds = frozenset({"linear"})
    settings = BdLoraConfig
    pads = False

    @classmethod
    def check(cls, config: Any) -> None:
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"use_bdlora with init_lora_weights={config.init_lora_weights!r}: block-diagonal factors cannot hold "
                "factors of the weight, which are dense; use True"
            )

    def make(self) -> tuple[Matrix, Matrix]:
        self.side = self.config.use_bdlora.sides(self.target.path)
        A, B = super().make()
        if self.side == "A":
            return Matrix(self.r, self.share(A.weight.shape[1])), B
        return A, Matrix(self.target.out_features, self.share(self.r)) if self.side else B

    def share(self, size: int) -> int:
        n = self.config.use_bdlora.nblocks
        for whole in (size, self.r if self.side == "A" else self.target.out_features):
            if whole % n:
                raise TargetError(
                    f"nblocks {n} does not divide {whole}, a size of lora_{self.side} on {self.target.path!r}"
                )
        return size // n

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        n = self.config.use_bdlora.nblocks
        if self.side == "A":
            return torch.block_diag(*A.chunk(n)), B
        return A, torch.block_diag(*B.chunk(n)) if self.side else B

    def sizes(self) -> tuple[int, int]:
        A, B = super().sizes()
        n = self.config.use_bdlora.nblocks
        return A // n if self.side == "A" else A, B // n if self.side == "B" else B


@dataclass(kw_only=True)
class BlockDiagonalLoraConfig(LoraConfig):
    """`LoraConfig(use_bdlora=BdLoraConfig(...))` under a name of its own."""

    use_bdlora: Settings | dict[str, Any] | None = field(default_factory=BdLoraConfig)
    """`BdLoraConfig`: which factor of which target, and in how many blocks."""

    adapter = Composition(BDLoRA)  # type: ignore[assignment]
    example = {"use_bdlora": {"target_modules_bd_b": ["attn", "attention"], "nblocks": 2}}
