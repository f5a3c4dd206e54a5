"""LN tuning: train the scales (and biases) of the normalisation layers, in copies.

    y = norm(x) * w' + b'

Zhao et al., 2023, arXiv:2312.11420. Trainable: the norms' own parameters. Mergeable. Starts as a no-op. As in PEFT, a
target that is no norm is trained whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name
from ..targets.target import Target


class LNTuning(Adapter):
    kinds = frozenset({"norm", "linear", "conv", "embedding"})

    def __init__(self, config: LNTuningConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.ln_tuning_layers = target.copy()

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.target.matrix_of(self.ln_tuning_layers)
        return weight.to(W.dtype), None if bias is None else bias.to(W.dtype)

    def describe(self) -> str:
        return f"{self.target.in_features}"


@dataclass(kw_only=True)
class LNTuningConfig(LayerConfig):
    peft_type, adapter = Name("LN_TUNING"), LNTuning
    default_roles = ("norm",)
