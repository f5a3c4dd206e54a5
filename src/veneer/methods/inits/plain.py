"""Convert any start to a plain LoRA of twice the rank on the unchanged base model.

s (B A - B0 A0) = s [B, -B0] [A; A0]
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError


def plain(config: Any) -> Any:
    """A config of twice the rank and the same scaling, with LoRA's own start."""
    growth = math.sqrt(2) if config.use_rslora else 2  # of alpha, for the same scaling
    config = copy.copy(config)
    config.r = 2 * config.r
    config.lora_alpha = growth * config.lora_alpha
    config.rank_pattern = {key: 2 * r for key, r in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {key: growth * alpha for key, alpha in (config.alpha_pattern or {}).items()}
    config.init_lora_weights = True
    config.corda_config = None
    config.lora_ga_config = None
    return config


def joined(lora: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors with its start appended to A and B: [A; A0] and [B, -B0]."""
    key_A = _key(tensors, "A")
    key_B = _key(tensors, "B")
    A = tensors[key_A]
    B = tensors[key_B]
    A0 = lora.start_A.to(A).reshape(A.shape)
    B0 = lora.start_B.to(B).reshape(B.shape)
    return tensors | {key_A: torch.cat([A, A0]), key_B: torch.cat([B, -B0], dim=1)}


def parted(lora: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `joined`: the adapter's tensors without the start, which is copied into the adapter."""
    key_A = _key(tensors, "A")
    key_B = _key(tensors, "B")
    A, A0 = tensors[key_A].split(lora.r)
    B, minus_B0 = tensors[key_B].split(lora.r, dim=1)
    lora.start_A.copy_(A0.reshape(lora.start_A.shape))
    lora.start_B.copy_(-minus_B0.reshape(lora.start_B.shape))
    return tensors | {key_A: A, key_B: B}


def check_joined(lora: Any) -> None:
    """Raise ConfigError if a variant has further tensors that depend on the rank: no start can be appended to them."""
    config = plain(lora.config)
    with torch.device("meta"):
        expected = config.build(lora.target).state_dict()
    tensors = joined(lora, lora.state_dict())
    if _shapes(tensors) != _shapes(expected):
        raise ConfigError(
            f"{type(lora).__name__} has tensors of rank {lora.r} besides A and B, which cannot hold a start "
            f"({lora.config.init_lora_weights!r}); use an init_lora_weights that does not subtract a start"
        )


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: t.shape for key, t in tensors.items()}


def _key(tensors: dict[str, Tensor], side: str) -> str:
    """The key of A or B."""
    names = (f"lora_{side}", f"lora_embedding_{side}")
    return next(key for key in tensors if key.startswith(names))
