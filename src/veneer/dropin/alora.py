"""PEFT's functions that locate the invocation tokens of an activated LoRA (aLoRA) in each row of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def calculate_alora_offsets(
    peft_config: Mapping[str, Any], active_adapter: Any, input_ids: Tensor, adapter_names: Sequence[str] | None = None
) -> list[int | None]:
    """Number of tokens from the start of the last invocation to the end of the row, or None, for each row.

    Args:
        input_ids: (batch, length).
        adapter_names: the adapter of each row; None uses the active adapter for all rows.
    """
    if adapter_names is None:
        active = active_adapter if isinstance(active_adapter, str) else next(iter(active_adapter))
        adapter_names = [active] * len(input_ids)
    offsets = []
    for row, name in zip(input_ids.tolist(), adapter_names, strict=True):
        config = peft_config.get(name)
        invocation = getattr(config, "alora_invocation_tokens", None)
        offsets.append(_offset(row, invocation))
    return offsets


def _offset(row: list[int], invocation: list[int] | None) -> int | None:
    """Distance of the last occurrence of `invocation` from the end of `row`, or None if there is none."""
    if not invocation:
        return None
    length = len(invocation)
    last = len(row) - length
    for start in range(last, -1, -1):
        if row[start : start + length] == invocation:
            return len(row) - start
    return None


def _uses_invocation(model: Any) -> bool:
    configs = model.peft_config.values()
    return any(getattr(config, "alora_invocation_tokens", None) for config in configs)


def _with_offsets(model: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = kwargs.get("adapter_names")
    offsets = calculate_alora_offsets(model.peft_config, model.active_adapter, input_ids, names)
    return kwargs | {"alora_offsets": offsets}


def get_alora_offsets_for_forward(
    model: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The keyword arguments of a forward call with `alora_offsets` added."""
    if kwargs.get("alora_offsets") is not None or not _uses_invocation(model):
        return kwargs
    if input_ids is None:
        warnings.warn(
            "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for this forward "
            "pass.",
            stacklevel=2,
        )
        return kwargs | {"alora_offsets": None}
    return _with_offsets(model, input_ids, kwargs)


def get_alora_offsets_for_generate(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The keyword arguments of a generate call with `alora_offsets` added."""
    if kwargs.get("alora_offsets") is not None or not _uses_invocation(model):
        return kwargs
    input_ids = args[0] if args else kwargs.get("input_ids")
    if input_ids is None:
        warnings.warn(
            "Cannot calculate aLoRA offsets during generate as input_ids are not available. Disabling aLoRA.",
            stacklevel=2,
        )
        return kwargs | {"alora_offsets": None}
    return _with_offsets(model, input_ids, kwargs)
