"""Any start as plain LoRA on the untouched base: s (B A - B0 A0) is s [B, -B0] [A; A0], of twice the rank."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import ConfigError

if TYPE_CHECKING:
    pass


def plain(config: Any) -> Any:
    """The config of twice the rank and the same scaling that starts like any LoRA."""
    config = copy.copy(config)
    grow = math.sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, grow * config.lora_alpha
    config.rank_pattern = {key: 2 * r for key, r in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {key: grow * alpha for key, alpha in (config.alpha_pattern or {}).items()}
    config.init_lora_weights, config.corda_config, config.lora_ga_config = True, None, None
    return config


def joined(lora: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors with its start beside A and B: [A; A0] and [B, -B0]."""
    a, b = _keys(tensors)
    A, B = tensors[a], tensors[b]
    A0, B0 = lora.start_A.to(A), lora.start_B.to(B)
    return tensors | {a: torch.cat([A, A0.reshape(A.shape)]), b: torch.cat([B, -B0.reshape(B.shape)], dim=1)}


def parted(lora: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `joined`; the start goes into the adapter."""
    a, b = _keys(tensors)
    (A, A0), (B, B0) = tensors[a].split(lora.r), tensors[b].split(lora.r, dim=1)
    lora.start_A.copy_(A0.reshape(lora.start_A.shape))
    lora.start_B.copy_(-B0.reshape(lora.start_B.shape))
    return tensors | {a: A, b: B}


def check_joined(lora: Any) -> None:
    """Raise ConfigError where a variant has other tensors of the rank, so that A and B cannot take in a start."""
    config = plain(lora.config)
    with torch.device("meta"):
        expected = {key: t.shape for key, t in config.build(lora.target).state_dict().items()}
    found = {key: t.shape for key, t in joined(lora, lora.state_dict()).items()}
    if found != expected:
        raise ConfigError(
            f"{type(lora).__name__} has tensors of rank {lora.r} besides A and B, which cannot take in a start "
            f"({lora.config.init_lora_weights!r}); use an init_lora_weights that takes nothing off"
        )


def _keys(tensors: dict[str, Tensor]) -> tuple[str, str]:
    a, b = (next(key for key in tensors if key.startswith(("lora_" + s, "lora_embedding_" + s))) for s in "AB")
    return a, b
