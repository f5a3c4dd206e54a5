"""MAM, mix and match: prefix tuning for attention and a scaled parallel adapter for the MLP.

    softmax(q [P_K, K]^T) [P_V, V] in attention;  MLP(x) + s up(relu(down(x))) beside the MLP

He et al., 2022, arXiv:2110.04366. Trainable: the prefix and 2 m d + m + d for each layer, m = d / 2. Not mergeable. The
prefix does not start as a no-op. It lives in the cache, so the model needs one: not BERT.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import Name
from .par_bn import ParBnConfig
from .prefix_tuning import PrefixTuningConfig
from .union import UnionConfig


@dataclass(kw_only=True)
class MAMConfig(UnionConfig):
    """Without `configs`: 30 positions through an MLP of width 800, and the parallel adapter's defaults."""

    peft_type, adapter = Name("MAM"), UnionConfig.adapter

    def __post_init__(self) -> None:
        if not self.configs:
            prefix = PrefixTuningConfig(num_virtual_tokens=30, prefix_projection=True, encoder_hidden_size=800)
            self.configs = [prefix, ParBnConfig()]
        super().__post_init__()
