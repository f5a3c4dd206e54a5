"""Invertible adapters with two bottleneck adapters a layer: AdapterHub's DoubleSeqBnInvConfig.

    A coupling of the word embeddings, its inverse before the head; y' = y + up(f(down(y))) after attention and MLP

Pfeiffer et al., 2020 (MAD-X), arXiv:2005.00052; Houlsby et al., 2019, arXiv:1902.00751. Trainable: about d^2 / 2 once,
and DoubleSeqBn's. Not mergeable. Starts as a no-op.
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
    """Stand behind the residual sum of the layer; not for two adapters a layer."""

    peft_type, adapter = Name("DOUBLE_SEQ_BN_INV"), SeqBnInv
