"""BD-LoRA: one of the two factors is block-diagonal, so that tensor-parallel devices need no extra communication.

    W' = W + s B A,  A = diag(A_1 ... A_n) or B = diag(B_1 ... B_n), by target

Wang et al., 2025, arXiv:2510.23346. Trainable: r (in / n + out) or r (in + out / n) per target. Mergeable. Starts as a
no-op: B is zero. The file holds the blocks stacked along the rows: lora_A (r, in / n), lora_B (out, r / n).
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
    """Targets with a block-diagonal A, by parts of their paths (row-parallel layers such as o_proj, down_proj)."""
    target_modules_bd_b: list[str] | None = None
    """Targets with a block-diagonal B, by parts of their paths (column-parallel layers such as q_proj, up_proj)."""
    nblocks: int = 1
    """n: number of blocks, equal to the number of shards."""
    match_strict: bool = True
    """Require that each target is in one of the two lists; False: other targets get plain LoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "nblocks")
        both = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        if both:
            raise ConfigError(f"target_modules_bd_a and target_modules_bd_b both name {', '.join(sorted(both))}")

    def sides(self, path: str) -> str:
        """Which factor of a target is block-diagonal: "A", "B" or ""."""
        in_A = _is_named(path, self.target_modules_bd_a)
        in_B = _is_named(path, self.target_modules_bd_b)
        if in_A and in_B:
            raise TargetError(f"use_bdlora: {path!r} is named by both target_modules_bd_a and target_modules_bd_b")
        if not (in_A or in_B) and self.match_strict:
            raise TargetError(
                f"use_bdlora: {path!r} is named by neither target_modules_bd_a nor target_modules_bd_b; name it, or "
                "set match_strict=False to give it plain LoRA"
            )
        if in_A:
            return "A"
        return "B" if in_B else ""


def _is_named(path: str, parts: list[str] | None) -> bool:
    """Whether a path contains one of the given parts."""
    return any(part in path for part in parts or ())


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
            A = Matrix(self.r, self.share(A.weight.shape[1]))
        elif self.side == "B":
            B = Matrix(self.target.out_features, self.share(self.r))
        return A, B

    def share(self, size: int) -> int:
        """The columns of one block. Both dimensions of the factor must be divisible by the number of blocks."""
        n = self.config.use_bdlora.nblocks
        rows = self.r if self.side == "A" else self.target.out_features
        for dimension in (size, rows):
            if dimension % n:
                raise TargetError(
                    f"nblocks {n} does not divide {dimension}, a size of lora_{self.side} on {self.target.path!r}"
                )
        return size // n

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        n = self.config.use_bdlora.nblocks
        if self.side == "A":
            A = torch.block_diag(*A.chunk(n))
        elif self.side == "B":
            B = torch.block_diag(*B.chunk(n))
        return A, B

    def sizes(self) -> tuple[int, int]:
        size_A, size_B = super().sizes()
        n = self.config.use_bdlora.nblocks
        if self.side == "A":
            size_A //= n
        elif self.side == "B":
            size_B //= n
        return size_A, size_B


@dataclass(kw_only=True)
class BlockDiagonalLoraConfig(LoraConfig):
    """Equivalent to `LoraConfig(use_bdlora=BdLoraConfig(...))`."""

    use_bdlora: Settings | dict[str, Any] | None = field(default_factory=BdLoraConfig)
    """`BdLoraConfig`: which factor of each target is block-diagonal, and in how many blocks."""

    adapter = Composition(BDLoRA)  # type: ignore[assignment]
    example = {"use_bdlora": {"target_modules_bd_b": ["attn", "attention"], "nblocks": 2}}
