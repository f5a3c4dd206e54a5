"""Sequential bottleneck adapters, one a layer: AdapterHub's SeqBnConfig.

    z' = z + up(f(down(z))),  z the output of a layer

Pfeiffer et al., 2021, arXiv:2005.00247. Trainable: 2 m d + m + d for each layer, m = d / 16. Not mergeable. Starts as a
no-op. In models that norm last (BERT) AdapterHub applies that norm once more, after the adapter; here it stays before.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import Name
from .bottleneck import BottleneckConfig
from .families.bottleneck import Bottleneck


@dataclass(kw_only=True)
class SeqBnConfig(BottleneckConfig):
    original_ln_before: bool = True
    """Stand behind the residual sum of the layer (and its norm, where that comes last), not in front of it."""

    peft_type, adapter = Name("SEQ_BN"), Bottleneck
