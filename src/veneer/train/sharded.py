"""Optimizer state of parameters that FSDP2 shards: files hold whole tensors, whatever the number of processes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..core.sharding import _share, whole
from ..errors import ConfigError


def shards(accelerator: Any) -> bool:
    """Whether `accelerator` shards the model, with FSDP2.

    On a CPU, accelerate silently replaces FSDP by DDP; this function sets it back to FSDP.

    Raises:
        ConfigError: the run was launched with FSDP1.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    asks_for_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if asks_for_fsdp and state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if state.distributed_type is not DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise ConfigError("FSDP1 is not supported; launch with `accelerate launch --use_fsdp --fsdp_version 2`")
    return True


def gathered(optimizer: Any) -> dict[str, Any]:
    """The state dict of an optimizer, with whole tensors. Every process must take part."""
    state: dict[str, Any] = tree_map_only(Tensor, whole, optimizer.state_dict())
    return state


def take_shares_(optimizer: torch.optim.Optimizer) -> None:
    """Make a sharded optimizer load whole tensors: each process keeps its own shard of them."""
    optimizer.register_load_state_dict_pre_hook(_with_shards)


def _with_shards(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> dict[str, Any]:
    """A state dict whose whole tensors are replaced by this process's shards."""
    parameters: list[Tensor] = []
    for group in optimizer.param_groups:
        parameters.extend(group["params"])
    state = {}
    for number, values in content["state"].items():
        state[number] = {name: _share(value, parameters[number]) for name, value in values.items()}
    return content | {"state": state}


def plain_as_shares() -> Any:
    """A context manager inside which whole tensors can be copied into sharded parameters."""
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()
