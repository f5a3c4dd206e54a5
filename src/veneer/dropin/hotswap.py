"""PEFT's hot swapping, which takes an adapter of a higher rank too, where the model is not compiled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..model import hotswap
from .configs import PeftConfig, hub_arguments
from .state import PREFIX


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


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """The same with tensors in memory, by keys with or without the adapter's name and PEFT's prefix (diffusers')."""
    hotswap.make_room(model, adapter_name, config)
    keys = {key: key.replace(f".{adapter_name}.", ".").removesuffix(f".{adapter_name}") for key in state_dict}
    tensors = {f"{PREFIX}{new.removeprefix(PREFIX)}": state_dict[old] for old, new in keys.items()}
    hotswap.hotswap_tensors(model, adapter_name, config, tensors)


def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
    """Raise unless an adapter of the second config may take the place of one of the first."""
    hotswap.check_settings(config0, config1, "default")
