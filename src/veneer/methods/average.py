"""Average: the weighted mean of what several trained adapters add, whatever their methods, ranks or targets.

    y' = y + sum_i w_i u_i,  u_i: what adapter i adds to y;  as a weight W' = W + sum_i w_i (W_i - W)

AdapterHub's `Average` (Poth et al., 2023, arXiv:2311.11077). With `learned` the weights are trained, one for each
adapter and module, as in AdaMerging (Yang et al., 2024, arXiv:2310.02575). Trainable: none, or k for each module.
Mergeable if all it reads are. Not a no-op. The file holds the weights and the adapters' names: load those first.
Unlike `add_weighted_adapter` it makes no new matrices and takes any method that adapts modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.config import Name
from ..errors import ConfigError
from .families.compositions import Weighted, WeightedConfig


class Average(Weighted):
    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + sum(
            w * self.update(name, x, y) for w, name in zip(self.composition_weights, self.names, strict=True)
        )

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        summed, bias = W, b
        for w, name in zip(self.composition_weights.detach(), self.names, strict=True):
            own, b_own = W, b
            for part in self.sibling(name).parts:
                own, b_own = part.fold(own, b_own)
            summed = summed + w * (own - W)
            if b_own is not None:
                start = b_own.new_zeros(()) if b is None else b
                bias = (start if bias is None else bias) + w * (b_own - start)
        return summed, bias


@dataclass(kw_only=True)
class AverageConfig(WeightedConfig):
    weights: list[float] | None = None
    """How much of each adapter; None: the same of each."""
    normalize_weights: bool = True
    """Divide the weights by their sum."""

    peft_type, adapter = Name("AVERAGE"), Average
    title = "an average"
    example = {"adapter_names": ["one", "two"]}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize_weights and self.weights and not sum(self.weights):
            raise ConfigError(f"weights {self.weights} sum to 0; set normalize_weights=False to use them as they are")

    def initial_weights(self) -> list[float]:
        weights = super().initial_weights()
        return [w / sum(weights) for w in weights] if self.normalize_weights else weights
