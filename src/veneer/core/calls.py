"""A call of the model as adapters see it: its number of rows, and facts repeated for each of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import VeneerError


def by_row(facts: dict[str, Any], kwargs: dict[str, Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """Repeat facts that hold one value per row when the batch is a multiple of them (beams, returned sequences)."""
    rows = batch_size(args, kwargs)
    return facts if rows is None else {name: _repeat(name, value, rows) for name, value in facts.items()}


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Rows of a model call, by its first tensor of two or more dimensions."""
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
