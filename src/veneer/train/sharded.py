"""Parameters that FSDP2 has sharded: read whole, and written whole, so that files know nothing of processes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..core.sharding import _share, whole
from ..errors import ConfigError


def shards(accelerator: Any) -> bool:
    """Whether `accelerator` shards the model, which means FSDP2.

    Asked for FSDP on a CPU, accelerate would fall back to DDP in silence; here it shards there too.

    Raises:
        ConfigError: it was launched with FSDP1.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if wanted and state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if state.distributed_type is not DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise ConfigError("FSDP1 is not supported; launch with --fsdp_version 2")
    return True


def gathered(optimizer: Any) -> dict[str, Any]:
    """An optimizer's state, whole. Every process must take part."""
    found: dict[str, Any] = tree_map_only(Tensor, whole, optimizer.state_dict())
    return found


def take_shares_(optimizer: torch.optim.Optimizer) -> None:
    """Make a sharded optimizer load a whole state: of each moment every process keeps its own part."""
    optimizer.register_load_state_dict_pre_hook(_shared_out)


def _shared_out(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {name: _share(value, parameters[number]) for name, value in own.items()}
        for number, own in content["state"].items()
    }
    return content | {"state": state}


def plain_as_shares() -> Any:
    """A context in which plain tensors can be copied into sharded parameters."""
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()
