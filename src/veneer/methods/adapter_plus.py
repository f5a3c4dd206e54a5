"""Adapter+: a bottleneck adapter after the MLP with a learned scaling for each channel.

    y' = y + s * up(gelu(down(y))),  s (d,), one factor for each channel of y

Steitz and Roth, 2024, arXiv:2406.06820. Trainable: 2 m d + m + 2 d for each layer. Not mergeable. Starts near the
identity, with Houlsby's small random weights. During training, the adapter is skipped for random rows of the batch
(stochastic depth).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..core.config import Name, check_range
from ..maths.dropout import keep_rows
from .bottleneck import BottleneckConfig
from .families.bottleneck import Bottleneck


class AdapterPlus(Bottleneck):
    def update(self, h: Tensor) -> Tensor:
        update = super().update(h)
        if not self.training:
            return update
        return keep_rows(update, self.config.stochastic_depth)


@dataclass(kw_only=True)
class AdapterPlusConfig(BottleneckConfig):
    reduction_factor: int | float | None = 2
    """Width of the model divided by the width of the bottleneck."""
    non_linearity: str | None = "gelu"
    """The activation function."""
    scaling: float | Literal["learned", "channel"] | None = "channel"
    """s: a number, "learned" for one learned factor, or "channel" for one learned factor per channel."""
    init_weights: bool | Literal["bert", "mam_adapter", "houlsby"] = "houlsby"
    """"houlsby" or "bert": small random weights; True or "mam_adapter": a no-op; False: larger ones (for tests)."""
    stochastic_depth: float = 0.1
    """Probability of skipping the adapter for a row of the batch during training."""

    peft_type = Name("ADAPTER_PLUS")
    adapter = AdapterPlus

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, 1, "stochastic_depth")
