"""MiCA: fix B at the minor left singular vectors of the weight, the directions that it uses least, and learn A.

    W' = W + s B A,  B = U[:, -r:] of W = U S V^T, fixed,  A learned from zero

Rüdiger and Raschka, 2026, arXiv:2604.01694. Trainable: r in per target. Mergeable. Starts as a no-op: A is zero. The
file also holds B.
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
        if target.kind == "embedding":
            make_buffer_(self, "lora_embedding_B")
        else:
            make_buffer_(self.lora_B, "weight")

    @torch.no_grad()
    def initialise(self, how: Any) -> None:
        A, B = self.matrices()
        if A.is_meta:
            return
        W = self.target.original_weight().float()
        if self.r > min(W.shape):
            raise TargetError(f"MiCA of rank {self.r} needs a weight of at least that rank, not {tuple(W.shape)}")
        A.zero_()
        U, _, _ = torch.linalg.svd(W, full_matrices=False)
        B.copy_(U[:, -self.r :])

    def sizes(self) -> tuple[int, int]:
        in_size, _ = super().sizes()
        return in_size, 0


def make_buffer_(module: nn.Module, name: str) -> None:
    """Turn a parameter of a module into a buffer, which is saved but not trained."""
    parameter = module._parameters.pop(name)
    assert parameter is not None
    module.register_buffer(name, parameter.detach())


@dataclass(kw_only=True)
class MicaConfig(LoraConfig):
    """Equivalent to `LoraConfig(init_lora_weights="mica")`."""

    init_lora_weights: bool | str = "mica"
    """"mica": B is taken from the weight and fixed, and A starts at zero."""

    adapter = Composition(MiCA)  # type: ignore[assignment]
