"""What an export to GGUF wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Export:
    """What was written."""

    out: str
    kind: str
    """"adapter" or "model"."""
    base: str
    architecture: str
    """llama.cpp's name."""
    dtype: str
    tensors: int
    bytes: int
    rank: int | None = None
    """The highest rank of an adapter's modules."""
    lost: float | None = None
    """|what the LoRA lacks| / |update|; 0 if it is the whole update. None for models."""
    rounding: float | None = None
    """|rounding error| / |weights| over the tensors that the adapter changes; None without an adapter."""
    rounding_of_change: float | None = None
    """|rounding error| / |update|; None without an adapter."""
    modelfile: str | None = None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return vars(self)
