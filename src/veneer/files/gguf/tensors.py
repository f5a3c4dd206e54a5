"""Names and layouts of tensors in GGUF files: gguf-py's table of names, and what llama.cpp stores in another way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from .architectures import Architecture, architecture_of, rope_of

QUERIES = (".q_proj.weight", ".q_proj.bias")
KEYS = (".k_proj.weight", ".k_proj.bias")
ROPE_FREQUENCIES = "rope_freqs.weight"
"""The divisors of Llama 3's frequencies."""
ROPE_LONG = "rope_factors_long.weight"
ROPE_SHORT = "rope_factors_short.weight"
"""The divisors of LongRoPE's frequencies, for long contexts and for short ones."""


class Naming:
    """The tensors of one base model in GGUF.

    Args:
        config: the base model's config.
    """

    def __init__(self, config: Any) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        self.config = config
        self.architecture: Architecture = architecture_of(config)
        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        number = numbers[self.architecture.name]
        self._names = get_tensor_name_map(number, config.num_hidden_layers)

    def of(self, name: str) -> str:
        """The name in GGUF of a parameter of the transformers model.

        Raises:
            ConfigError: llama.cpp has no such tensor.
        """
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(f"llama.cpp's {self.architecture.title} has no tensor for {name!r}")
        return found

    def arranged(self, name: str, value: Tensor) -> Tensor:
        """A parameter's value as llama.cpp stores it."""
        if name.endswith(self.architecture.transposed):
            return value.T
        if name.endswith("norm.weight") and self.architecture.norm_offset:
            return value + self.architecture.norm_offset
        return self.interleaved(name, value)

    def restored(self, name: str, stored: Tensor) -> Tensor:
        """The value of a parameter from what llama.cpp stores: the inverse of `arranged`."""
        if name.endswith(self.architecture.transposed):
            return stored.T
        if name.endswith("norm.weight") and self.architecture.norm_offset:
            return stored - self.architecture.norm_offset
        heads = self._interleaved_heads(name)
        if heads is None:
            return stored
        pairs = stored.reshape(heads, -1, 2, *stored.shape[1:])  # (heads, d / 2, 2, ...)
        return pairs.transpose(1, 2).reshape(stored.shape)

    def interleaved(self, name: str, value: Tensor) -> Tensor:
        """The rows of q or k with the two halves of each head interleaved; other tensors unchanged.

        transformers rotates entry i of a head with entry i + d / 2, llama.cpp entry 2 i with entry 2 i + 1.
        """
        heads = self._interleaved_heads(name)
        if heads is None:
            return value
        halves = value.reshape(heads, 2, -1, *value.shape[1:])  # (heads, 2, d / 2, ...)
        return halves.transpose(1, 2).reshape(value.shape)

    def _interleaved_heads(self, name: str) -> int | None:
        """The number of heads of a parameter whose rows llama.cpp interleaves; None for others."""
        if not self.architecture.interleaved:
            return None
        if name.endswith(QUERIES):
            return int(self.config.num_attention_heads)
        if name.endswith(KEYS):
            return int(self.config.num_key_value_heads)
        return None


def rope_factors(config: Any) -> dict[str, Tensor]:
    """Divisors of the rotary embedding's frequencies that llama.cpp reads as tensors, by name; (d / 2) each."""
    if not architecture_of(config).ropes:
        return {}
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        return {ROPE_FREQUENCIES: _llama3_factors(config, rope["rope_theta"])}
    if kind == "longrope":
        return {
            ROPE_LONG: torch.tensor(rope["long_factor"], dtype=torch.float32),
            ROPE_SHORT: torch.tensor(rope["short_factor"], dtype=torch.float32),
        }
    return {}


def _llama3_factors(config: Any, theta: float) -> Tensor:
    """Unscaled frequencies divided by those that transformers computes for Llama 3."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    return theta**-exponents / scaled.float()
