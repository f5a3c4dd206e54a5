"""DiReFT: LoReFT without orthonormal rows and without subtracting the projection; like LoRA on hidden states.

    h' = h + W2^T (W1 h + b)

Wu et al., 2024, arXiv:2404.03592. Trainable parameters and edited positions: as for LoReFT. Not mergeable. Starts as a
no-op: W1 = 0, b = 0. pyreft's class of this name keeps the rows orthonormal; `orthogonality=True` does the same here.
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
    """Keep the rows of the projection orthonormal."""
    subtract_projection: bool = False
    """Subtract the projection of h."""

    peft_type = Name("DIREFT")
    adapter = DiReFT
