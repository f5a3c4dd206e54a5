"""NoReFT: LoReFT without the constraint that the projection's rows are orthonormal.

    h' = h + W2^T (W1 h + b - W2 h)

Wu et al., 2024, arXiv:2404.03592 (appendix). Trainable and positions: as LoReFT. Not mergeable. Starts as a no-op.
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
    """The projection's rows are kept orthonormal."""

    peft_type, adapter = Name("NOREFT"), NoReFT
