"""The number of rows in a model call, and facts repeated to match it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import VeneerError


def by_row(facts: dict[str, Any], kwargs: dict[str, Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """Repeat facts with one value per row if the batch has a multiple of that many rows (beams, returned sequences)."""
    rows = batch_size(args, kwargs)
    return facts if rows is None else {name: _repeat(name, value, rows) for name, value in facts.items()}


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The number of rows in a model call, from its first tensor with two or more dimensions; None without one."""
    preferred = [kwargs.get(key) for key in ("input_ids", "inputs_embeds", "decoder_input_ids", "encoder_outputs")]
    for value in (*args, *preferred, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 1:
            return value.shape[0]
    return None


def _repeat(name: str, value: Any, rows: int) -> Any:
    if not isinstance(value, (list, tuple, Tensor)) or (isinstance(value, Tensor) and value.dim() == 0):
        return value
    if len(value) == rows:
        return value
    if len(value) == 0 or rows % len(value):
        raise VeneerError(f"{name} has {len(value)} entries for a batch of {rows} rows; give one entry for each row")
    times = rows // len(value)
    if isinstance(value, Tensor):
        return value.repeat_interleave(times, dim=0)
    repeated = []
    for entry in value:
        repeated += [entry] * times
    return repeated
