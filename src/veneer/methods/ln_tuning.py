"""LN tuning: train copies of the scales (and biases) of the normalisation layers.

    y = norm(x) * w' + b'

Zhao et al., 2023, arXiv:2312.11420. Trainable: the parameters of the norms. Mergeable. Starts as a no-op. As in PEFT,
if a target is not a normalisation layer, all of its parameters are trained.
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
        if bias is not None:
            bias = bias.to(W.dtype)
        return weight.to(W.dtype), bias

    def describe(self) -> str:
        return str(self.target.in_features)


@dataclass(kw_only=True)
class LNTuningConfig(LayerConfig):
    peft_type = Name("LN_TUNING")
    adapter = LNTuning
    default_roles = ("norm",)
