"""DoubleSeqBn: two sequential bottleneck adapters per layer, as in AdapterHub's DoubleSeqBnConfig.

    y' = y + up(f(down(y))),  y the output of attention, and that of the MLP

Houlsby et al., 2019, arXiv:1902.00751. Trainable: 2 m d + m + d for each adapter, m = d / 16. Not mergeable. Starts as
a no-op. In an encoder-decoder the cross-attention also gets an adapter, which AdapterHub calls cross_adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import Name
from .bottleneck import BottleneckConfig
from .families.bottleneck import Bottleneck


@dataclass(kw_only=True)
class DoubleSeqBnConfig(BottleneckConfig):
    placement: str = "houlsby"
    """"houlsby": after attention and after the MLP."""

    peft_type = Name("DOUBLE_SEQ_BN")
    adapter = Bottleneck
