"""A model's shape without its weights: built from its config on the meta device, which takes no memory."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError, first_line
from ..upstream.auto import default_config, makes
from .pull import resolve

TASKS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")
"""What a config may be the config of, tried in order."""


def skeleton(model: str | None = None, model_type: str | None = None) -> Any:
    """A model on the meta device.

    Args:
        model: a directory, a name `veneer pull` knows, or a hub id, of which only the config is read.
        model_type: an architecture of transformers ("gpt2", "llama") at its default sizes, instead.

    Raises:
        ConfigError: neither or both are given, or transformers has no such architecture.
    """
    if (model is None) == (model_type is None):
        raise ConfigError("give either a model or a model type")
    config = default_config(str(model_type)) if model is None else _of_model(model)
    for task in TASKS:
        auto = makes(task, config)
        if auto is not None:
            with torch.device("meta"):
                return auto.from_config(config)
    raise ConfigError(f"transformers builds no model from a {type(config).__name__}")


def _of_model(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve(model))
    except OSError as error:
        reason = first_line(error)
        raise ConfigError(f"{model!r} is no directory with a config, nor could one be had: {reason}") from None
