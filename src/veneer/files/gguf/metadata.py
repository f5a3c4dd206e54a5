"""The metadata of a whole model in GGUF: its sizes, its rotary embedding and where it comes from."""

from __future__ import annotations

from typing import Any

from .architectures import architecture_of, local_rope_of, rope_of
from .file import Metadata


def of_model(config: Any, name: str, base: str | None) -> Metadata:
    """The metadata of a model without its vocabulary.

    Args:
        config: the model's config.
        name: the model's name for people.
        base: the name of the model that it was fine-tuned from.
    """
    metadata: Metadata = {"general.type": "model", "general.name": name}
    if base is not None:
        metadata["general.base_model.count"] = 1
        metadata["general.base_model.0.name"] = base
    architecture = architecture_of(config)
    for key, setting in architecture.metadata.items():
        value = getattr(config, setting)
        if value is not None:
            metadata[f"{architecture.name}.{key}"] = value
    sizes = _sizes(config) | _rope(config)
    for key, value in sizes.items():
        metadata[f"{architecture.name}.{key}"] = value
    return metadata


def of_adapter(name: str, base: str | None, alpha: float) -> Metadata:
    """The metadata of a LoRA adapter."""
    metadata: Metadata = {"general.type": "adapter", "adapter.type": "lora", "general.name": name}
    if base is not None:
        metadata["general.base_model.count"] = 1
        metadata["general.base_model.0.name"] = base
    metadata["adapter.lora.alpha"] = float(alpha)
    return metadata


def _sizes(config: Any) -> Metadata:
    """Sizes that a config gives by other settings."""
    if config.model_type == "gpt2":
        return {"feed_forward_length": config.n_inner or 4 * config.n_embd}
    size = head_size(config)
    return {"attention.key_length": size, "attention.value_length": size}


def head_size(config: Any) -> int:
    """The number of entries of one attention head."""
    size = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads


def _rope(config: Any) -> Metadata:
    """The rotary embedding. Llama 3's scaling is not here: it is a tensor."""
    if not architecture_of(config).ropes:
        return {}
    rope = rope_of(config)
    rotated = int(head_size(config) * rope.get("partial_rotary_factor", 1.0))
    metadata: Metadata = {"rope.dimension_count": rotated, "rope.freq_base": float(rope["rope_theta"])}
    local = local_rope_of(config)
    if local is not None:
        metadata["rope.freq_base_swa"] = float(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        metadata["rope.scaling.type"] = kind
        metadata["rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        metadata["rope.scaling.original_context_length"] = int(original)
        for setting in ("beta_fast", "beta_slow"):
            if rope.get(setting) is not None:
                metadata[f"rope.scaling.yarn_{setting}"] = float(rope[setting])
    if kind == "longrope":
        metadata["rope.scaling.type"] = kind
        metadata["rope.scaling.attn_factor"] = _longrope_attention(config)
    return metadata


def _longrope_attention(config: Any) -> float:
    """The factor of q and k with LongRoPE, as transformers computes it."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    return float(factor)
