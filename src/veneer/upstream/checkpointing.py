"""Activation checkpointing: transformers 5.23 renamed `gradient_checkpointing_enable` and its relatives."""

from __future__ import annotations

from typing import Any


def enable(model: Any, settings: dict[str, Any], **others: Any) -> None:
    """Turn activation checkpointing on, with `settings` for `torch.utils.checkpoint`.

    Args:
        others: further arguments of the model's own method (`every_n_layers`, `offload`).
    """
    if hasattr(model, "activation_checkpointing_enable"):  # from 5.23 on, where the other warns
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings, **others)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings, **others)


def is_on(model: Any) -> bool:
    """Whether layers of the model are computed again in the backward pass."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):  # the first from 5.23 on
        if hasattr(model, name):
            return bool(getattr(model, name))
    return False
