"""`peft.tuners.tuners_utils`: which keys of a model's state dict belong to its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..layers import PeftLayer
from ..tuners import BaseTuner

WRAPPED = ("base_layer", "original_module", "token_adapter")
"""Children of a layer that are not parameters of its method."""


def _get_tuner_state_dict_key_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """Beginnings of the keys of the methods' parameters and buffers; those of trained copies are not among them.

    Args:
        adapter_name: only those of this adapter.
    """
    prefixes = set()
    for path, module in model.named_modules():
        is_method = isinstance(module, BaseTuner) or (isinstance(module, PeftLayer) and not _is_auxiliary(module))
        if not is_method:
            continue
        for name, child in module._modules.items():
            is_container = isinstance(module, PeftLayer) or hasattr(child, "_keys")
            if child is None or name in WRAPPED or not is_container:
                continue
            prefix = f"{path}.{name}" if path else name
            if adapter_name is None:
                prefixes.add(prefix)
            elif adapter_name in child:  # type: ignore[operator]
                prefixes.add(f"{prefix}.{adapter_name}")
    return prefixes


def _is_auxiliary(layer: PeftLayer) -> bool:
    """Whether a layer has only trained copies of the module, or only trained tokens next to another method."""
    names = {name for name, child in layer._modules.items() if child is not None}
    return layer.is_copy or names <= set(WRAPPED)


def _filter_state_dict_by_key_prefixes(state_dict: Mapping[str, Any], prefixes: set[str]) -> dict[str, Any]:
    """The entries whose key is one of the prefixes, or goes on behind one with a dot."""
    return {key: value for key, value in state_dict.items() if not prefixes.isdisjoint(_beginnings(key))}


def _beginnings(key: str) -> list[str]:
    """A key, and all that it lies under: "a.b" and "a" for "a.b"."""
    words = key.split(".")
    return [".".join(words[: i + 1]) for i in range(len(words))]
