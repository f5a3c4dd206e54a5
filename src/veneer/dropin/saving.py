"""Saving adapters as PEFT does: weight file, config and model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import checkpoint, provenance
from ..errors import CheckpointError
from ..files.pull import hub_id
from ..files.read import PICKLE_NAME, WEIGHTS_NAME
from ..files.write import write_atomically
from .configs import as_ours
from .strict import is_strict
from .tables import methods as table


def save_adapter(
    model: Any, name: str, directory: Path, tensors: dict[str, Tensor], safe: bool, is_main_process: bool
) -> None:
    """Write one adapter's tensors and config. Every process of a sharded run must take part."""
    from safetensors.torch import save as serialise

    seen: set[int] = set()
    whole = {key: checkpoint.gathered(tensor, seen) for key, tensor in tensors.items()}
    if not is_main_process:
        return
    directory.mkdir(parents=True, exist_ok=True)
    if safe:
        weights = checkpoint.base_weights(model.get_base_model(), model._state, name)
        notes = {"base": provenance.fingerprint(weights)}
        metadata = provenance.metadata(notes, whole, as_ours(model.peft_config[name]))
        write_atomically(directory / WEIGHTS_NAME, serialise(whole, metadata))
    elif is_strict():
        raise CheckpointError("veneer writes safetensors only; pickles can run code when they are loaded")
    else:
        torch.save(whole, directory / PICKLE_NAME)
    write_config(model, name, directory)


def write_config(model: Any, name: str, directory: Path) -> None:
    """Write one adapter's config, with the base model's class if the config has no task type."""
    config = model.peft_config[name]
    base = model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    saved = config.saved()
    saved.inference_mode = True
    mapping = None
    if saved.task_type is None:
        mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    saved.save_pretrained(directory, auto_mapping_dict=mapping)


def write_card(model: Any, directory: Path) -> None:
    """Write README.md, or complete an existing one."""
    from huggingface_hub import ModelCard, ModelCardData

    path = directory / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData(), template_str=CARD)
    _fill_metadata(card.data, model)
    if "PEFT" not in card.text:
        card.text += f"\n\n- PEFT {table.VERSION}"
    card.save(path)


def _fill_metadata(metadata: Any, model: Any) -> None:
    """Set the library, the base model, the task and the tags of a model card."""
    configs = model.peft_config.values()
    tags = set(metadata.get("tags") or ())
    metadata["library_name"] = "peft"
    if any(config.task_type == "CAUSAL_LM" for config in configs):
        metadata["pipeline_tag"] = "text-generation"
    base_name = hub_id(_base_name(model))
    if base_name:
        metadata["base_model"] = base_name
        tags.add(f"base_model:adapter:{base_name}")
    if hasattr(model, "generate"):
        tags.add("transformers")
        if any(config.peft_type == "LORA" for config in configs):
            tags.add("lora")
    metadata["tags"] = sorted(tags)


def _base_name(model: Any) -> str | None:
    """The base model's name or path: by its own config, the first adapter's config, or the model itself."""
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    first_adapter = next(iter(model.peft_config.values()), None)
    return (
        (config or {}).get("_name_or_path")
        or getattr(first_adapter, "base_model_name_or_path", None)
        or model.get_base_model().__dict__.get("name_or_path")
    )


CARD = (
    """---
{{ card_data }}
---

# Model card

An adapter, to be put on its base model with `PeftModel.from_pretrained`.

### Framework versions

- PEFT """
    + table.VERSION
    + "\n"
)
