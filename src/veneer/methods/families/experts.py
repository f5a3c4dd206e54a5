"""Trained LoRA adapters that serve as the experts of another adapter, which mixes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ...core import checkpoint
from ...core.adapter import Tensors
from ...core.attach import try_on
from ...errors import CheckpointError, ConfigError
from ...files.read import PREFIX
from ...targets.target import Target
from ..lora import LoRA, LoraConfig

Expert = tuple[LoraConfig, Tensors, dict[str, Any]]
"""The config, tensors and provenance of a trained LoRA adapter."""


def read_expert(name: str, source: str, mixer: str) -> Expert:
    """Read a plain LoRA adapter from a directory.

    Raises:
        ConfigError: the adapter is not LoRA, or is LoRA with variants, modules_to_save or biases.
    """
    config, tensors, provenance, _ = checkpoint.load(source)
    if not isinstance(config, LoraConfig) or type(config).adapter is not LoRA:
        raise ConfigError(f"{mixer} mixes LoRA adapters; {name!r} at {source!r} is {config.peft_type}")
    if config.variants() or config.modules_to_save or config.bias != "none":
        extras = ", ".join(config.variants()) or "modules_to_save or bias"
        raise ConfigError(f"{mixer} mixes plain LoRA adapters; {name!r} at {source!r} is LORA with {extras}")
    return config, tensors, provenance


def build_expert(config: LoraConfig, tensors: Tensors, target: Target) -> LoRA | None:
    """Build an expert on one target; None if it does not adapt that target."""
    prefix = f"{PREFIX}{target.path}."
    target_tensors = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            target_tensors[key.removeprefix(prefix)] = tensor
    if not target_tensors:
        return None
    lora = LoRA(config, target)
    shapes = _shapes(target_tensors)
    expected = _shapes(lora.export())
    if shapes != expected:
        raise CheckpointError(
            f"an expert does not fit {target.path!r}: it has {_spelled(shapes)}, which should be {_spelled(expected)}"
        )
    lora.absorb(target_tensors)
    return lora


def less_mean(tensors: Tensors, others: Sequence[Tensors]) -> Tensors:
    """Subtract from each tensor the mean of the tensors of the same name in `others`."""
    if not others:
        return tensors
    shapes = _shapes(tensors)
    for other in others:
        if _shapes(other) != shapes:
            raise ConfigError("factors can be subtracted only if all adapters have the same targets and ranks")
    differences = {}
    for key, tensor in tensors.items():
        stacked = torch.stack([other[key] for other in others])
        differences[key] = tensor - stacked.mean(0)
    return differences


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {key: tuple(t.shape) for key, t in tensors.items()}


def _spelled(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key} {shape}" for key, shape in shapes.items())


def common_targets(model: nn.Module, experts: Iterable[Expert], check_base: bool = True) -> list[str]:
    """The paths of the modules that at least one expert adapts.

    Raises an error unless each expert fits `model` and, if `check_base`, was trained on it.
    """
    paths: list[str] = []
    for i, (config, tensors, provenance) in enumerate(experts):
        checked = provenance if check_base else {}
        paths += try_on(model, config, f"expert {i}", tensors, checked)
    return list(dict.fromkeys(paths))
