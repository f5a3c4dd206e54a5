"""Recipes, the YAML files that describe training runs: reading them, and what other programs call their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

RECIPE_NAME = "recipe.yaml"
OTHER_KEYS = {
    "base": "model",
    "base_model": "model",
    "model_name_or_path": "model",
    "adapter": "method",
    "adapter_name_or_path": "start_from",
    "lora_model_dir": "start_from",
    "resume_adapter_file": "start_from",
    "peft_type": "method",
    "quantize": "quantise",
    "quantization": "quantise",
    "load_in_4bit": "quantise",
    "load_in_8bit": "quantise",
    "lora_r": "rank",
    "r": "rank",
    "target_modules": "targets",
    "dataset": "data",
    "train_data": "data",
    "train_file": "data",
    "validation_file": "eval_data",
    "test_split": "eval_split",
    "val_size": "eval_split",
    "cutoff_len": "max_length",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "steps": "max_steps",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "grad_accum": "accumulate",
    "gradient_accumulation_steps": "accumulate",
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "lr_scheduler_kwargs": "schedule_options",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "optim": "optimizer",
    "optim_args": "optimizer_options",
    "loraplus_lr_ratio": "lora_plus_ratio",
    "neftune_noise_alpha": "neftune_alpha",
    "hub_model_id": "push_to_hub",
    "hub_private_repo": "hub_private",
    "wandb": "report_to",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "logging_steps": "log_every",
    "out_dir": "output",
    "output_dir": "output",
}
"""What keys of other programs' files are called in a recipe, and their options on the command line."""


def read(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, or does not hold a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe {str(path)!r}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{str(path)!r} is not a YAML recipe: {reason}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{str(path)!r} is not a recipe: it must consist of `key: value` lines")
    return content
