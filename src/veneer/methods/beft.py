"""BEFT: learn an offset to the bias of the value projections.

    y' = y + b',  that is, the weight stays W and the bias becomes bias + b'

Huang et al., 2025, arXiv:2509.15974. Trainable: out per target. Mergeable if the target has a bias. Starts as a no-op:
b' is zero. Unlike in PEFT, GPT-2's Conv1D can be a target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name
from ..errors import NotMergeable
from ..targets.target import Target


class BEFT(Adapter):
    def __init__(self, config: BeftConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.has_fold = target.bias() is not None
        bias = torch.zeros(1, target.out_features)
        if not config.init_weights:
            bias = torch.randn(1, target.out_features)
        self.beft_bias = nn.Parameter(bias)

    @property
    def commutes(self) -> bool:
        return True

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.beft_bias[0]

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if b is None:
            raise NotMergeable(
                f"{self.target.path!r} has no bias that BEFT could be merged into; keep the adapter unmerged"
            )
        return W, b + self.beft_bias[0].to(b.dtype)

    def expected_parameters(self) -> int:
        return self.target.out_features

    def describe(self) -> str:
        return f"out={self.beft_bias.numel()}"


@dataclass(kw_only=True)
class BeftConfig(LayerConfig):
    init_weights: bool = True
    """Start at zero, as a no-op; False: random normal values (for tests)."""

    peft_type = Name("BEFT")
    adapter = BEFT
    default_roles = ("attention.v",)
