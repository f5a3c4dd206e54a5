"""LoRA with a bias: the update also shifts each output.

    W' = W + s B A,  b' = b + s c

This is the option `lora_bias` of Hugging Face PEFT. It is meant for LoRA (Hu et al., 2021, arXiv:2106.09685) extracted
from fully fine-tuned weights, whose biases changed as well. Trainable: LoRA's parameters and out per target. Mergeable
if the target has a bias. Starts as a no-op: c is zero. With DoRA, a combination that PEFT refuses, c is not scaled by
the magnitudes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import NotMergeable
from ..targets.target import Matrix
from .families.variants import Composition
from .lora import LoRA, LoraConfig


class BiasedLoRA(LoRA):
    kinds = frozenset({"linear", "conv"})

    def make(self) -> tuple[Matrix, Matrix]:
        A, B = super().make()
        B.bias = nn.Parameter(torch.zeros(self.target.out_features))
        return A, B

    def shift(self) -> Tensor:
        bias: Tensor = self.lora_B.bias  # type: ignore[assignment]
        return bias * self.scaling

    def finish(self, z: Tensor) -> Tensor:
        shift = self.target.channels(self.shift(), z)
        return super().finish(z) + shift

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if b is None:
            raise NotMergeable(f"{self.target.path!r} has no bias to merge LoRA's into; keep the adapter unmerged")
        W, b = super().fold(W, b)
        return W, b + self.shift().to(b)  # type: ignore[union-attr]

    def expected_parameters(self) -> int:
        return super().expected_parameters() + self.target.out_features


@dataclass(kw_only=True)
class BiasedLoraConfig(LoraConfig):
    """Equivalent to `LoraConfig(lora_bias=True)`."""

    lora_bias: bool = True
    """Also learn an offset to the bias."""

    adapter = Composition(BiasedLoRA)  # type: ignore[assignment]
