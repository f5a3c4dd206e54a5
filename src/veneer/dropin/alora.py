"""PEFT's functions that say where in each row an activated LoRA begins: its offset, counted from the row's end."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def calculate_alora_offsets(
    peft_config: Mapping[str, Any], active_adapter: Any, input_ids: Tensor, adapter_names: Sequence[str] | None = None
) -> list[int | None]:
    """For each row how many tokens from the last invocation on; None without one.

    Args:
        input_ids: (batch, length).
        adapter_names: the adapter of each row; None: the active one for all.
    """
    active = active_adapter if isinstance(active_adapter, str) else next(iter(active_adapter))
    names = [active] * len(input_ids) if adapter_names is None else adapter_names
    wanted = [getattr(peft_config.get(name), "alora_invocation_tokens", None) for name in names]
    return [_offset(row, tokens) for row, tokens in zip(input_ids.tolist(), wanted, strict=True)]


def _offset(row: list[int], tokens: list[int] | None) -> int | None:
    n = len(tokens or ())
    starts = [i for i in range(len(row) - n + 1) if row[i : i + n] == tokens] if n else []
    return len(row) - starts[-1] if starts else None


def _invokes(model: Any) -> bool:
    return any(getattr(config, "alora_invocation_tokens", None) for config in model.peft_config.values())


def get_alora_offsets_for_forward(
    model: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """A forward call's keyword arguments with `alora_offsets`."""
    if kwargs.get("alora_offsets") is not None or not _invokes(model):
        return kwargs
    if input_ids is None:
        warnings.warn(
            "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for this forward "
            "pass.",
            stacklevel=2,
        )
        return kwargs | {"alora_offsets": None}
    names = kwargs.get("adapter_names")
    found = calculate_alora_offsets(model.peft_config, model.active_adapter, input_ids, names)
    return kwargs | {"alora_offsets": found}


def get_alora_offsets_for_generate(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """A generate call's keyword arguments with `alora_offsets`."""
    if kwargs.get("alora_offsets") is not None or not _invokes(model):
        return kwargs
    input_ids = args[0] if args else kwargs.get("input_ids")
    if input_ids is None:
        warnings.warn(
            "Cannot calculate aLoRA offsets during generate as input_ids are not available. Disabling aLoRA.",
            stacklevel=2,
        )
        return kwargs | {"alora_offsets": None}
    names = kwargs.get("adapter_names")
    return kwargs | {
        "alora_offsets": calculate_alora_offsets(model.peft_config, model.active_adapter, input_ids, names)
    }
