"""MAM (mix and match): prefix tuning for the attention and a scaled parallel adapter for the MLP.

    softmax(q [P_K, K]^T) [P_V, V] in attention;  MLP(x) + s up(relu(down(x))) in place of MLP(x)

He et al., 2022, arXiv:2110.04366. Trainable: the prefix and 2 m d + m + d for each layer, m = d / 2. Not mergeable. The
prefix does not start as a no-op. It is stored in the key-value cache, so models without one, such as BERT, are not
supported.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import Name
from .par_bn import ParBnConfig
from .prefix_tuning import PrefixTuningConfig
from .union import UnionConfig


@dataclass(kw_only=True)
class MAMConfig(UnionConfig):
    """The default `configs`: a prefix of 30 positions made by an MLP of width 800, and the default parallel adapter."""

    peft_type = Name("MAM")
    adapter = UnionConfig.adapter

    def __post_init__(self) -> None:
        if not self.configs:
            prefix = PrefixTuningConfig(num_virtual_tokens=30, prefix_projection=True, encoder_hidden_size=800)
            self.configs = [prefix, ParBnConfig()]
        super().__post_init__()
