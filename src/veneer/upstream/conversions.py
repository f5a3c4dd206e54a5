"""Architectures whose checkpoints transformers converts when it loads them, because their modules were fused."""

from __future__ import annotations

MIXTRAL = "mixtral"


def expert_family(model_type: str | None) -> str | None:
    """The architecture whose conversion a model type shares ("qwen3_moe": "qwen2_moe"); None if it shares none.

    As in PEFT, Mixtral is of its own family, and Qwen2-MoE itself is of none.
    """
    try:
        from transformers import conversion_mapping
    except ImportError:
        return None
    if model_type == MIXTRAL:
        return MIXTRAL
    families = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return families.get(model_type)
