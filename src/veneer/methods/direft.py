"""DiReFT: LoReFT without orthonormal rows and without the difference; about LoRA, on hidden states of the prompt.

    h' = h + W2^T (W1 h + b)

Wu et al., 2024, arXiv:2404.03592. Trainable and positions: as LoReFT. Not mergeable. Starts as a no-op: W1 = 0, b = 0.
pyreft's class of this name keeps the rows orthonormal; that is `orthogonality=True`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import Name
from .loreft import LoReFT, LoReftConfig


class DiReFT(LoReFT):
    pass


@dataclass(kw_only=True)
class DiReftConfig(LoReftConfig):
    orthogonality: bool = False
    """The projection's rows are kept orthonormal."""
    subtract_projection: bool = False
    """Take the projection of h away."""

    peft_type, adapter = Name("DIREFT"), DiReFT
