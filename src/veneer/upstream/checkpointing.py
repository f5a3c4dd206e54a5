"""Activation checkpointing: transformers 5.23 renamed `gradient_checkpointing_enable` and related attributes."""

from __future__ import annotations

from typing import Any


def enable(model: Any, settings: dict[str, Any], **others: Any) -> None:
    """Turn activation checkpointing on, with `settings` for `torch.utils.checkpoint`.

    Args:
        others: further arguments of the model's method (`every_n_layers`, `offload`).
    """
    if hasattr(model, "activation_checkpointing_enable"):  # from 5.23 on, which warns about the other name
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings, **others)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings, **others)


def is_on(model: Any) -> bool:
    """Whether activation checkpointing is on, so that the backward pass computes layers again."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):  # from 5.23 on, and before it
        if hasattr(model, name):
            return bool(getattr(model, name))
    return False
