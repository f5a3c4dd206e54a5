"""What transformers asks of PEFT when it loads an adapter into a model itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from .old_experts import both, flat, modern, modernise
from .tables import methods as table


def build_peft_weight_mapping(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> list[Any]:
    """Renamings from a file's keys to a model's: the prefix goes, and the adapter's name comes in."""
    from transformers.core_model_loading import WeightRenaming

    kind = getattr(getattr(peft_config, "peft_type", None), "value", None)
    prefixes = {row.prefix for k, row in table.METHODS.items() if kind is None or k == kind}
    found = [WeightRenaming("base_model.model.model.", "model."), WeightRenaming("base_model.model.", "")]
    found += [WeightRenaming(rf"({re.escape(p)}[^\.]*)", rf"\1.{adapter_name}") for p in sorted(prefixes)]
    given = list(weight_conversions or ())
    found += [c for c in given if isinstance(c, WeightRenaming)]
    return [
        *found,
        *(joined for c in given if not isinstance(c, WeightRenaming) for joined in _joining(c, adapter_name)),
    ]


def _joining(conversion: Any, adapter_name: str) -> Iterator[Any]:
    """How the LoRA factors of single experts become those of the parameter that `conversion` makes of their weights."""
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Join(ConversionOps):
        def __init__(self, side: str) -> None:
            self.side = side

        @torch.no_grad()
        def convert(
            self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
        ) -> Any:
            stacks = [torch.stack(list(input_dict.pop(p))) for p in source_patterns if p in input_dict]
            joined = both(stacks, self.side) if len(stacks) > 1 else stacks[0]
            return {target_patterns[0]: flat(joined, self.side)}

    target = conversion.target_patterns[0]
    path, _, name = target.rpartition(".")
    if len(conversion.target_patterns) > 1 or name not in ("gate_up_proj", "down_proj"):
        return
    place = f"{path}.base_layer_1" if name == "gate_up_proj" else path
    sources = [pattern.rsplit(".", 1)[0] for pattern in conversion.source_patterns]
    for side in "AB":
        yield WeightConverter(
            source_patterns=[f"{source}.lora_{side}.*" for source in sources],
            target_patterns=[f"{place}.lora_{side}.{adapter_name}.weight"],
            operations=[Join(side)],
        )


def convert_peft_config_for_transformers(peft_config: Any, model: Any, conversions: Any = None) -> None:
    """Rewrite, in place, the targets of a file that was made for an architecture of before transformers 5."""
    modernise(model, peft_config)


def convert_peft_adapter_state_dict_for_transformers(
    model: Any, peft_config: Any, adapter_state_dict: Any, adapter_name: str = "default"
) -> Any:
    """The file's tensors as today's architecture has them."""
    return modern(adapter_state_dict)
