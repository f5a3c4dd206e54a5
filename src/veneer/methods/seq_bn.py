"""SeqBn: one sequential bottleneck adapter per layer, as in AdapterHub's SeqBnConfig.

    z' = z + up(f(down(z))),  z the output of a layer

Pfeiffer et al., 2021, arXiv:2005.00247. Trainable: 2 m d + m + d for each layer, m = d / 16. Not mergeable. Starts as a
no-op. In post-norm models (BERT), AdapterHub applies the last norm again after the adapter; here it is applied only
once, before the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import Name
from .bottleneck import BottleneckConfig
from .families.bottleneck import Bottleneck


@dataclass(kw_only=True)
class SeqBnConfig(BottleneckConfig):
    original_ln_before: bool = True
    """Place the adapter after the layer's residual sum (and after its norm, if the norm comes last), not before it."""

    peft_type = Name("SEQ_BN")
    adapter = Bottleneck
