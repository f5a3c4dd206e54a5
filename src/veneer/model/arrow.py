"""`create_arrow_model`, PEFT's constructor of an Arrow model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..core.config import CONFIG_NAME
from ..files.find import check_hub_arguments, find_file
from ..methods.arrow import ArrowConfig, ArrowLoraConfig
from .peft_model import PeftModel, get_peft_model


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None,
    **hub: Any,
) -> PeftModel:
    """Create a model with one adapter, "arrow_router", which routes each token among trained LoRA adapters.

    Args:
        base_model: the model that the LoRA adapters were trained on.
        task_specific_adapter_paths: directories or hub ids of the adapters to route among.
        arrow_config: settings of the router; its adapter lists are set here.
        general_adapter_paths: directories or hub ids of adapters that hold general knowledge.
        hub: `subfolder`, `revision`, `token`, `cache_dir` and the like.
    """
    config = arrow_router(task_specific_adapter_paths, arrow_config, general_adapter_paths, **hub)
    return get_peft_model(base_model, config, "arrow_router").eval()


def arrow_router(
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None,
    **hub: Any,
) -> ArrowLoraConfig:
    """The config of a router; arguments as of `create_arrow_model`."""
    check_hub_arguments(hub)
    tasks = _local_directories(task_specific_adapter_paths, hub)
    general = _local_directories(general_adapter_paths, hub)
    router = replace(arrow_config, task_adapter_names=tasks, gks_adapter_names=general)
    return ArrowLoraConfig(arrow_config=router, inference_mode=True)


def _local_directories(sources: Sequence[str] | None, hub: dict[str, Any]) -> list[str]:
    """Local directories of adapters, downloaded from the hub where necessary."""
    directories = []
    for source in sources or ():
        config_file = find_file(source, CONFIG_NAME, **hub)
        directories.append(str(config_file.parent))
    return directories
