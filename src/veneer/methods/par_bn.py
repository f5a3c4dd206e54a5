"""ParBn: a bottleneck adapter in parallel to the MLP, which reads the same input as the MLP.

    y' = y + s up(f(down(x)))

He et al., 2022, arXiv:2110.04366. Trainable: m (in + out) + m + out for each MLP, and s if learned;
m = width / reduction_factor. Not mergeable. Starts as a no-op: `up` is zero. If the MLP is not a module (BERT, OPT),
the adapter on its last layer reads the input of its first layer. AdapterHub's scaled_par_bn is `scaling="learned"`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import Name
from .bottleneck import BottleneckConfig
from .families.parallel import Parallel


@dataclass(kw_only=True)
class ParBnConfig(BottleneckConfig):
    placement: str = "parallel"
    """Where the bottleneck acts: "parallel"."""

    peft_type = Name("PAR_BN")
    adapter = Parallel
