"""PEFT's hot swapping, which takes an adapter of a higher rank too, where the model is not compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ... import hotswap
from .configs import PeftConfig, hub_arguments


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str = "default",
    torch_device: str | None = None,
    **settings: Any,
) -> None:
    """Overwrite an adapter with a saved one; see `veneer.hotswap_adapter`."""
    hub = {name: value for name, value in settings.items() if name in hub_arguments()}
    hotswap.make_room(model, adapter_name, PeftConfig.from_pretrained(model_name_or_path, **hub))
    hotswap.hotswap_adapter(model, model_name_or_path, adapter_name, torch_device, **settings)
