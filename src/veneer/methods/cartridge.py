"""Cartridge: a trained cache of keys and values that replaces a long text.

    softmax(q [Z_K, K]^T) [Z_V, V],  Z_K, Z_V (n, width) learned in every layer, the first ones frozen

Eyuboglu et al., 2025, arXiv:2506.06266. Trainable: (n - frozen) x layers x 2 x width. Not mergeable: the learned
positions are cache entries. The frozen positions are attention sinks. The paper starts from the cache of the text's
first tokens (`initialize_kv_prefix_from_text`) and trains on conversations about the text; here, as in PEFT, the start
is random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core import checkpoint
from ..core.adapter import Tensors
from ..core.config import Config, Name, PromptConfig, check_range
from ..core.prompt import Spec
from ..core.sharding import whole
from ..errors import ConfigError
from .prefix_tuning import Prefix

SIZES = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


class Cartridge(Prefix):
    frozen_embedding: Tensor

    def __init__(self, config: CartridgeConfig, spec: Spec, words: Tensor) -> None:
        super().__init__(config, spec, words)
        rows = torch.randn(self.n, spec.layers * 2 * spec.width)
        frozen = config.num_frozen_tokens
        self.register_buffer("frozen_embedding", rows[:frozen].clone())
        self.trainable_embedding = nn.Parameter(rows[frozen:].clone())

    def prefix(self) -> Tensor:
        return torch.cat([self.frozen_embedding, whole(self.trainable_embedding)])

    def absorb(self, tensors: Tensors) -> None:
        frozen = self.config.num_frozen_tokens
        for rows in tensors.values():
            embeddings = {
                "frozen_embedding": rows[:frozen].clone(),
                "trainable_embedding": rows[frozen:].clone(),
            }
            super().absorb(embeddings)


@dataclass(kw_only=True)
class CartridgeConfig(PromptConfig):
    num_frozen_tokens: int = 1
    """Number of positions at the start that stay frozen; they act as attention sinks, which training would harm."""

    peft_type = Name("CARTRIDGE")
    prompt = Cartridge
    fills_cache = True
    learning_rate = 6e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, math.inf, "num_frozen_tokens")
        assert self.num_virtual_tokens is not None
        if self.num_frozen_tokens >= self.num_virtual_tokens and not self.inference_mode:
            raise ConfigError(
                f"num_frozen_tokens = {self.num_frozen_tokens} leaves none of the {self.num_virtual_tokens} positions "
                "of num_virtual_tokens to train"
            )


def compose_cartridge_adapters(adapter_paths: Sequence[str | Path], *, output_path: str | Path) -> None:
    """Concatenate several saved cartridges into one; the frozen positions of the first one stay frozen.

    Raises:
        ConfigError: there are fewer than two, some are not cartridges, or they belong to different models.
    """
    configs = [Config.from_pretrained(path) for path in adapter_paths]
    if len(configs) < 2:
        raise ConfigError(f"composing needs two cartridges or more, not {len(configs)}")
    for path, config in zip(adapter_paths, configs, strict=True):
        if not isinstance(config, CartridgeConfig):
            raise ConfigError(f"{str(path)!r} holds {config.peft_type}, not a cartridge")
        _check_same_model(path, config, adapter_paths[0], configs[0])
    files = [checkpoint.read(path) for path in adapter_paths]
    embeddings = torch.cat([tensors["prompt_embeddings"] for tensors, _ in files])
    tensors = {"prompt_embeddings": embeddings}
    joined = replace(configs[0], num_virtual_tokens=len(embeddings))  # type: ignore[call-arg]
    _, metadata = files[0]
    checkpoint.write(Path(output_path), tensors, metadata, joined)


def _check_same_model(path: str | Path, config: Config, first_path: str | Path, first: Config) -> None:
    for name in SIZES:
        size = getattr(config, name)
        first_size = getattr(first, name)
        if size != first_size:
            raise ConfigError(
                f"{str(path)!r} was trained for another model: its {name} is {size}, that of {str(first_path)!r} "
                f"{first_size}"
            )
