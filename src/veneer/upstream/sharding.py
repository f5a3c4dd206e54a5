"""Recognising modules whose parameters FSDP shards across processes.

They are recognised by class names, which are the same in torch 2.9 to 2.13: `fully_shard` changes a module's class to a
subclass of `FSDPModule`, and the older wrapper is `FullyShardedDataParallel`.
"""

from __future__ import annotations

from torch import nn

NAMES = ("FSDPModule", "FullyShardedDataParallel")


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP was applied to the module itself, not only to a module around it or inside it."""
    return any(kind.__name__ in NAMES for kind in type(module).__mro__)
