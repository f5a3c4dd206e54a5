"""DoubleSeqBnInv: invertible adapters and two bottleneck adapters per layer, as in AdapterHub's config of that name.

    A coupling of the word embeddings, its inverse before the head; y' = y + up(f(down(y))) after attention and MLP

Pfeiffer et al., 2020 (MAD-X), arXiv:2005.00052; Houlsby et al., 2019, arXiv:1902.00751. Trainable: about d^2 / 2 once,
plus those of DoubleSeqBn. Not mergeable. Starts as a no-op.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import Name
from .seq_bn_inv import SeqBnInv, SeqBnInvConfig


@dataclass(kw_only=True)
class DoubleSeqBnInvConfig(SeqBnInvConfig):
    placement: str = "houlsby"
    """"houlsby": after attention and after the MLP."""
    original_ln_before: bool = False
    """Not available with two adapters per layer; must be False."""

    peft_type = Name("DOUBLE_SEQ_BN_INV")
    adapter = SeqBnInv
