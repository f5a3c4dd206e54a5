"""Trained LoRA adapters as parts of another adapter that mixes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ...core import checkpoint
from ...core.adapter import Tensors
from ...core.attach import try_on
from ...errors import CheckpointError, ConfigError
from ...targets.target import Target
from ..lora import LoRA, LoraConfig

Expert = tuple[LoraConfig, Tensors, dict[str, Any]]


def read_expert(name: str, source: str, mixer: str) -> Expert:
    """The config, tensors and notes of a plain LoRA adapter in a directory."""
    config, tensors, notes = checkpoint.load(source)
    if not isinstance(config, LoraConfig) or type(config).adapter is not LoRA:
        raise ConfigError(f"{mixer} mixes LoRA adapters; {name!r} at {source!r} is {config.peft_type}")
    if config.variants() or config.modules_to_save or config.bias != "none":
        given = ", ".join(config.variants()) or "modules_to_save or bias"
        raise ConfigError(f"{mixer} mixes plain LoRA adapters; {name!r} at {source!r} is LORA with {given}")
    return config, tensors, notes


def build_expert(config: LoraConfig, tensors: Tensors, target: Target) -> LoRA | None:
    """An expert on one target; None where it does not adapt it."""
    prefix = f"base_model.model.{target.path}."
    own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    if not own:
        return None
    lora = LoRA(config, target)
    expected = {key: t.shape for key, t in lora.export().items()}
    if expected != {key: t.shape for key, t in own.items()}:
        raise CheckpointError(
            f"an expert does not fit {target.path!r}: it has {_shapes(own)}, which should be {_shapes(lora.export())}"
        )
    lora.absorb(own)
    return lora


def less_mean(tensors: Tensors, others: Sequence[Tensors]) -> Tensors:
    """Tensors less the mean of others of the same name."""
    if not others:
        return tensors
    if any({k: t.shape for k, t in other.items()} != {k: t.shape for k, t in tensors.items()} for other in others):
        raise ConfigError("factors are subtracted as they are: give all adapters the same targets and ranks")
    return {key: t - torch.stack([other[key] for other in others]).mean(0) for key, t in tensors.items()}


def _shapes(tensors: Tensors) -> str:
    return ", ".join(f"{key} {tuple(t.shape)}" for key, t in tensors.items())


def common_targets(model: nn.Module, experts: Iterable[Expert], check_base: bool = True) -> list[str]:
    """The paths that any of the experts adapts. Raises unless each fits `model`, the base it was trained on."""
    paths: dict[str, None] = {}
    for i, (config, tensors, notes) in enumerate(experts):
        paths |= dict.fromkeys(try_on(model, config, f"expert {i}", tensors, notes if check_base else {}))
    return list(paths)
