"""Average: the weighted mean of what several trained adapters add, whatever their methods, ranks or targets.

    y' = y + sum_i w_i u_i,  u_i: what adapter i adds to y;  as a weight W' = W + sum_i w_i (W_i - W)

AdapterHub's `Average` (Poth et al., 2023, arXiv:2311.11077). With `learned` the weights are trained, one for each
adapter and module, as in AdaMerging (Yang et al., 2024, arXiv:2310.02575). Trainable: none, or k for each module.
Mergeable if all the adapters that it reads are. Does not start as a no-op. The file holds the weights and the names of
the adapters, which must be loaded first. Unlike `add_weighted_adapter` it creates no new matrices, and it reads
adapters of any method that adapts modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.config import Name
from ..errors import ConfigError
from .families.compositions import Weighted, WeightedConfig


class Average(Weighted):
    def post(self, x: Tensor, y: Tensor) -> Tensor:
        total: Any = 0
        for weight, name in zip(self.composition_weights, self.names, strict=True):
            total = total + weight * self.update(name, x, y)
        return y + total

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        summed_W = W
        summed_b = b
        for weight, name in zip(self.composition_weights.detach(), self.names, strict=True):
            folded_W, folded_b = W, b
            for part in self.sibling(name).parts:
                folded_W, folded_b = part.fold(folded_W, folded_b)
            summed_W = summed_W + weight * (folded_W - W)
            if folded_b is None:
                continue
            base_b = folded_b.new_zeros(()) if b is None else b
            if summed_b is None:
                summed_b = base_b
            summed_b = summed_b + weight * (folded_b - base_b)
        return summed_W, summed_b


@dataclass(kw_only=True)
class AverageConfig(WeightedConfig):
    weights: list[float] | None = None
    """The weight of each adapter; None: equal weights."""
    normalize_weights: bool = True
    """Divide the weights by their sum."""

    peft_type = Name("AVERAGE")
    adapter = Average
    title = "an average"
    example = {"adapter_names": ["one", "two"]}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize_weights and self.weights and not sum(self.weights):
            raise ConfigError(f"weights {self.weights} sum to 0; set normalize_weights=False to use them as they are")

    def initial_weights(self) -> list[float]:
        weights = super().initial_weights()
        if not self.normalize_weights:
            return weights
        total = sum(weights)
        return [weight / total for weight in weights]
