"""What transformers asks of PEFT when it loads an adapter into a model itself."""

from __future__ import annotations

import re
from typing import Any

from . import table
from .fused import modern, modernise


def build_peft_weight_mapping(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> list[Any]:
    """Renamings from a file's keys to a model's: the prefix goes, and the adapter's name comes in."""
    from transformers.core_model_loading import WeightRenaming

    kind = getattr(getattr(peft_config, "peft_type", None), "value", None)
    prefixes = {row.prefix for k, row in table.METHODS.items() if kind is None or k == kind}
    found = [WeightRenaming("base_model.model.model.", "model."), WeightRenaming("base_model.model.", "")]
    found += [WeightRenaming(rf"({re.escape(p)}[^\.]*)", rf"\1.{adapter_name}") for p in sorted(prefixes)]
    return [*found, *(c for c in weight_conversions or () if isinstance(c, WeightRenaming))]


def convert_peft_config_for_transformers(peft_config: Any, model: Any, conversions: Any = None) -> None:
    """Rewrite, in place, the targets of a file that was made for an architecture of before transformers 5."""
    modernise(model, peft_config)


def convert_peft_adapter_state_dict_for_transformers(
    model: Any, peft_config: Any, adapter_state_dict: Any, adapter_name: str = "default"
) -> Any:
    """The file's tensors as today's architecture has them."""
    return modern(adapter_state_dict)
