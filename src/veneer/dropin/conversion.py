"""PEFT's functions that transformers calls when it loads an adapter into a model itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from .old_experts import both, flat, modern, modernise
from .tables import methods as table


def build_peft_weight_mapping(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> list[Any]:
    """Conversions from a file's keys to a model's: the file's prefix is dropped, the adapter's name is inserted."""
    from transformers.core_model_loading import WeightRenaming

    conversions = [
        WeightRenaming("base_model.model.model.", "model."),
        WeightRenaming("base_model.model.", ""),
    ]
    for prefix in _prefixes(peft_config):
        attribute = rf"({re.escape(prefix)}[^\.]*)"
        conversions.append(WeightRenaming(attribute, rf"\1.{adapter_name}"))
    converters: list[Any] = []
    for conversion in weight_conversions or ():
        if isinstance(conversion, WeightRenaming):
            conversions.append(conversion)
        else:
            converters += _factor_converters(conversion, adapter_name)
    return conversions + converters


def _prefixes(peft_config: Any) -> list[str]:
    """Prefixes of the adapter's tensors: those of the config's method, or of every method without a config."""
    peft_type = getattr(peft_config, "peft_type", None)
    kind = getattr(peft_type, "value", None)
    prefixes = {row.prefix for name, row in table.METHODS.items() if kind in (None, name)}
    return sorted(prefixes)


def _factor_converters(conversion: Any, adapter_name: str) -> Iterator[Any]:
    """Converters that fuse the LoRA factors of single experts as `conversion` fuses the weights of these experts."""
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Join(ConversionOps):
        def __init__(self, side: str) -> None:
            self.side = side

        @torch.no_grad()
        def convert(
            self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
        ) -> Any:
            stacks = []
            for pattern in source_patterns:
                if pattern in input_dict:
                    factors = list(input_dict.pop(pattern))
                    stacks.append(torch.stack(factors))
            joined = both(stacks, self.side) if len(stacks) > 1 else stacks[0]
            return {target_patterns[0]: flat(joined, self.side)}

    target, *others = conversion.target_patterns
    path, _, name = target.rpartition(".")
    if others or name not in ("gate_up_proj", "down_proj"):
        return
    layer = f"{path}.base_layer_1" if name == "gate_up_proj" else path
    experts = [pattern.rsplit(".", 1)[0] for pattern in conversion.source_patterns]
    for side in "AB":
        sources = [f"{expert}.lora_{side}.*" for expert in experts]
        factor = f"{layer}.lora_{side}.{adapter_name}.weight"
        yield WeightConverter(source_patterns=sources, target_patterns=[factor], operations=[Join(side)])


def convert_peft_config_for_transformers(peft_config: Any, model: Any, conversions: Any = None) -> None:
    """Rewrite in place the targets of a config that was made for an architecture from before transformers 5."""
    modernise(model, peft_config)


def convert_peft_adapter_state_dict_for_transformers(
    model: Any, peft_config: Any, adapter_state_dict: Any, adapter_name: str = "default"
) -> Any:
    """The file's tensors in the layout of the current architecture."""
    return modern(adapter_state_dict)
