"""Models without weights: built from a config on the meta device, whose tensors take no memory."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError, first_line
from ..upstream.auto import default_config, makes
from .locate import locate

TASKS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")
"""The transformers classes to try, in order."""


def skeleton(model: str | None = None, model_type: str | None = None) -> Any:
    """Build a model on the meta device.

    Args:
        model: a directory, a name that `veneer pull` knows, or a hub id; only the config is read.
        model_type: instead of `model`: an architecture of transformers ("gpt2", "llama") at its default sizes.

    Raises:
        ConfigError: neither or both are given, or transformers has no such architecture.
    """
    if (model is None) == (model_type is None):
        raise ConfigError("give either a model or a model type")
    config = _config_of(model) if model is not None else default_config(str(model_type))
    for task in TASKS:
        auto = makes(task, config)
        if auto is not None:
            with torch.device("meta"):
                return auto.from_config(config)
    raise ConfigError(f"transformers has no model for a {type(config).__name__}")


def _config_of(model: str) -> Any:
    """The config of a model, from a local directory or the hub."""
    from transformers import AutoConfig

    place = locate(model)
    try:
        return AutoConfig.from_pretrained(place.name, **place.arguments)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the config of {model!r} cannot be read: {first_line(error)}") from None
