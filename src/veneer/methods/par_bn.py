"""Parallel bottleneck adapters: a small MLP beside the model's own, on the same input.

    y' = y + s up(f(down(x)))

He et al., 2022, arXiv:2110.04366. Trainable: m (in + out) + m + out for each MLP, and s if learned; m = width /
reduction_factor. Not mergeable. Starts as a no-op: `up` is zero. Where the MLP is no module of its own (BERT, OPT), the
module that it begins with hands its input on to the adapter at the one it ends with; AdapterHub's scaled_par_bn is
`scaling="learned"`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import Name
from .bottleneck import BottleneckConfig
from .families.parallel import Parallel


@dataclass(kw_only=True)
class ParBnConfig(BottleneckConfig):
    placement: str = "parallel"
    """"parallel"."""

    peft_type, adapter = Name("PAR_BN"), Parallel
