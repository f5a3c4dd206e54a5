"""`peft.tuners.lora.loraga`: where a model's parameters are."""

from __future__ import annotations

from typing import Any

import torch


def get_model_device(model: Any) -> torch.device:
    """The device of a model's first parameter."""
    model = getattr(model, "module", model)
    return next(model.parameters()).device
