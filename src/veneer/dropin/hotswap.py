"""PEFT's hot swapping. Unless the model is compiled, the new adapter may also have a higher rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..files.read import PREFIX
from ..model import hotswap
from .configs import PeftConfig, hub_arguments
from .wording import pefts_words


@pefts_words()
def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | None = None,
    **settings: Any,
) -> None:
    """Overwrite an adapter with a saved one; see `veneer.hotswap_adapter`."""
    names_of_hub = hub_arguments()
    hub = {name: value for name, value in settings.items() if name in names_of_hub}
    config = PeftConfig.from_pretrained(model_name_or_path, **hub)
    hotswap.make_room(model, adapter_name, config)
    hotswap.hotswap_adapter(model, model_name_or_path, adapter_name, torch_device, **settings)


@pefts_words()
def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """Overwrite an adapter with tensors in memory.

    The keys may be with or without the adapter's name and PEFT's prefix (diffusers passes them without).
    """
    hotswap.make_room(model, adapter_name, config)
    tensors = {}
    for key, tensor in state_dict.items():
        nameless = key.replace(f".{adapter_name}.", ".")
        nameless = nameless.removesuffix(f".{adapter_name}")
        nameless = nameless.removeprefix(PREFIX)
        tensors[PREFIX + nameless] = tensor
    hotswap.hotswap_tensors(model, adapter_name, config, tensors)


@pefts_words()
def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
    """Raise unless an adapter with the second config can replace one with the first."""
    hotswap.check_settings(config0, config1, "default")
