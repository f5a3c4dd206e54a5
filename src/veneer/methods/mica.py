"""MiCA: learn in the weight's least used directions, its minor left singular vectors, which stay fixed.

    W' = W + s B A,  B = U[:, -r:] of W = U S V^T, fixed,  A learned from zero

Rüdiger and Raschka, 2026, arXiv:2604.01694. Trainable: r in per target. Mergeable. Starts as a no-op: A is zero. The
file holds B too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import TargetError
from ..targets.target import Target
from .families.variants import Composition
from .lora import LoRA, LoraConfig


class MiCA(LoRA):
    pads = False
    kinds = frozenset({"linear", "conv", "embedding"})

    def __init__(self, config: LoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        owner, name = (self, "lora_embedding_B") if target.kind == "embedding" else (self.lora_B, "weight")
        owner.register_buffer(name, owner._parameters.pop(name).detach())  # type: ignore[union-attr]

    @torch.no_grad()
    def initialise(self, how: Any) -> None:
        A, B = self.matrices()
        if A.is_meta:
            return
        W = self.target.original_weight().float()
        if self.r > min(W.shape):
            raise TargetError(f"MiCA of rank {self.r} needs a weight of at least that rank, not {tuple(W.shape)}")
        A.zero_()
        B.copy_(torch.linalg.svd(W, full_matrices=False)[0][:, -self.r :])

    def sizes(self) -> tuple[int, int]:
        return super().sizes()[0], 0


@dataclass(kw_only=True)
class MicaConfig(LoraConfig):
    """`LoraConfig(init_lora_weights="mica")` under a name of its own."""

    init_lora_weights: bool | str = "mica"
    """"mica": B from the weight and fixed, A zero."""

    adapter = Composition(MiCA)  # type: ignore[assignment]
