"""PEFT's way to an Arrow model."""

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
    """A model with one adapter, "arrow_router", that holds trained LoRA adapters and routes each token among them."""
    check_hub_arguments(hub)
    tasks, general = (
        [str(find_file(source, CONFIG_NAME, **hub).parent) for source in sources or ()]
        for sources in (task_specific_adapter_paths, general_adapter_paths)
    )
    how = replace(arrow_config, task_adapter_names=tasks, gks_adapter_names=general)
    return get_peft_model(base_model, ArrowLoraConfig(arrow_config=how, inference_mode=True), "arrow_router").eval()
