"""Compacter++: Compacter with one adapter per layer, after the MLP.

    y' = y + up(gelu(down(y))),  both matrices sum_i A_i (x) (s_i t_i)

Karimi Mahabadi et al., 2021, arXiv:2106.04647. Trainable: r (2 d + 2 m) + m + d for each layer, and n^3 once. Not
mergeable. Starts as a no-op. Acts before the residual sum, as in the paper; AdapterHub's acts after it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import Name
from .compacter import Compacter, CompacterConfig


@dataclass(kw_only=True)
class CompacterPlusPlusConfig(CompacterConfig):
    placement: str = "pfeiffer"
    """"pfeiffer": after the MLP."""

    peft_type = Name("COMPACTER_PLUS_PLUS")
    adapter = Compacter
