"""`peft.tuners.lora.corda`: where a model's parameters are."""

from __future__ import annotations

from typing import Any


def get_model_device(model: Any) -> str:
    """The type of the device of a model's first parameter."""
    model = getattr(model, "module", model)
    return next(model.parameters()).device.type
