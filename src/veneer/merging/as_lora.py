"""The LoRA that is nearest to an adapter's update, module by module, and how much of the update it lacks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..formats.lora import Pair
from ..model.to_lora import Update

HIGHEST = 64
"""The rank of the LoRA that is nearest to an update without factors, if none is asked for."""


@dataclass
class Nearest:
    """The pairs found so far; their scaling is 1."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    squared_update: float = 0.0
    squared_rest: float = 0.0

    def add(self, path: str, update: Update, rank: int | None, limit: int | None = None) -> None:
        """Add the pair of a module.

        Args:
            update: its update.
            rank: the rank of the pair; None: that of the update's factors, or at most `HIGHEST` without factors.
            limit: the highest rank that is allowed.
        """
        most = rank
        if rank is None and update.pair is None:
            most = HIGHEST
        if most is None and limit is not None and update.pair is not None and update.pair[0].shape[0] > limit:
            most = limit
        A, B = update.reduced(most)
        self.pairs[path] = Pair(A, B, float(A.shape[0]))
        if most is not None:
            whole = update.matrix()
            self.squared_update += float(whole.double().square().sum())
            self.squared_rest += float((whole - B @ A).double().square().sum())

    @property
    def lost(self) -> float:
        """|what the pairs lack| / |update|, over the modules whose pairs are not exact."""
        return math.sqrt(self.squared_rest / self.squared_update) if self.squared_update else 0.0
