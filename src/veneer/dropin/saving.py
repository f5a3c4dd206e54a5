"""Writing adapters as PEFT does: the file, the config, and a card that says what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import checkpoint
from ..core import provenance as notes
from ..errors import CheckpointError
from ..files.read import PICKLE_NAME, WEIGHTS_NAME
from ..files.write import write_atomically
from .configs import as_ours
from .strict import is_strict
from .tables import methods as table


def save_adapter(
    model: Any, name: str, directory: Path, tensors: dict[str, Tensor], safe: bool, is_main_process: bool
) -> None:
    """Write one adapter's tensors and config."""
    from safetensors.torch import save as serialise

    seen: set[int] = set()
    whole = {key: checkpoint.gathered(t, seen) for key, t in tensors.items()}
    if not is_main_process:
        return
    directory.mkdir(parents=True, exist_ok=True)
    if safe:
        weights = checkpoint.base_weights(model.get_base_model(), model._state, name)
        about = notes.metadata({"base": notes.fingerprint(weights)}, whole, as_ours(model.peft_config[name]))
        write_atomically(directory / WEIGHTS_NAME, serialise(whole, about))
    elif is_strict():
        raise CheckpointError("veneer writes safetensors only; pickles can run code when they are loaded")
    else:
        torch.save(whole, directory / PICKLE_NAME)
    write_config(model, name, directory)


def write_config(model: Any, name: str, directory: Path) -> None:
    config, base = model.peft_config[name], model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    saved = config.saved()
    saved.inference_mode = True
    mapping = None
    if saved.task_type is None:
        mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    saved.save_pretrained(directory, auto_mapping_dict=mapping)


def write_card(model: Any, directory: Path) -> None:
    """README.md, or its metadata where there is one."""
    from huggingface_hub import ModelCard, ModelCardData

    path = directory / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData(), template_str=CARD)
    data = card.data
    data["library_name"] = "peft"
    config = getattr(model, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else config or {}
    name = config.get("_name_or_path") or next((c.base_model_name_or_path for c in model.peft_config.values()), None)
    name = name or model.get_base_model().__dict__.get("name_or_path")
    tags = set(data.get("tags") or ())
    if any(c.task_type == "CAUSAL_LM" for c in model.peft_config.values()):
        data["pipeline_tag"] = "text-generation"
    if name:
        data["base_model"] = name
        tags.add(f"base_model:adapter:{name}")
    kinds = {c.peft_type.value for c in model.peft_config.values()}
    tags |= (
        {kind.lower() for kind in kinds if kind == "LORA"} | {"transformers"} if hasattr(model, "generate") else tags
    )
    data["tags"] = sorted(tags)
    lines = [line for line in card.text.split("\n") if "PEFT " not in line]
    card.text = "\n".join([*lines, "", f"- PEFT {table.VERSION}"]) if "PEFT" not in card.text else card.text
    card.save(path)


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
