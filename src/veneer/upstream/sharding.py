"""Modules whose parameters torch shards over processes.

Told by the names of their classes, the same in torch 2.9 to 2.13: `fully_shard` gives a module a class of its own below
`FSDPModule`, the older wrapper is `FullyShardedDataParallel`.
"""

from __future__ import annotations

from torch import nn

NAMES = ("FSDPModule", "FullyShardedDataParallel")


def is_sharded(module: nn.Module) -> bool:
    """Whether a module is the root of a sharded unit itself."""
    return any(kind.__name__ in NAMES for kind in type(module).__mro__)
