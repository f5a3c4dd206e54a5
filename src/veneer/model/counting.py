"""Counting: what an adapter adds, layer by layer, and what of a model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.state import State


@dataclass(frozen=True)
class Row:
    """What one adapter adds to one module."""

    path: str
    method: str
    r: int | None
    in_features: int
    out_features: int
    expected: int
    """Trainable parameters by the method's formula: r x (in + out) for LoRA."""
    added: int
    """Parameters really there."""

    @property
    def formula(self) -> str:
        if self.r is not None and self.expected == self.r * (self.in_features + self.out_features):
            return f"{self.r} x ({self.in_features:,} + {self.out_features:,})"
        return ""


@dataclass(frozen=True)
class Plan:
    """The rows of an adapter and their sums; prints as a table."""

    adapter: str
    rows: tuple[Row, ...]
    other: int
    """Parameters outside the layers: a prompt, a gate."""

    @property
    def expected(self) -> int:
        return sum(row.expected for row in self.rows) + self.other

    @property
    def total(self) -> int:
        return sum(row.added for row in self.rows) + self.other

    def __str__(self) -> str:
        width = max([len(row.path) for row in self.rows], default=10)
        kind = max([len(row.method) for row in self.rows], default=4)
        lines = [f"{r.path:<{width}}  {r.method:<{kind}}  {r.formula:>22}  {r.added:>12,}" for r in self.rows]
        if self.other:
            lines.append(f"{'outside the layers':<{width}}  {'':<{kind}}  {'':>22}  {self.other:>12,}")
        lines.append(f"{'sum':<{width}}  {'':<{kind}}  {'':>22}  {self.total:>12,}")
        return "\n".join(lines)


def plan(state: State, name: str) -> Plan:
    """Count an adapter's parameters from its formula and from its tensors."""
    rows = tuple(_row(path, part) for path, adapter in state.adapters(name).items() for part in adapter.parts)
    rest = [m for m in (state.shared.get(name), state.prompts.get(name)) if m is not None]
    return Plan(name, rows, sum(p.numel() for module in rest for p in module.parameters()))


def _row(path: str, part: Any) -> Row:
    target = part.target
    sizes = (target.in_features, target.out_features) if target.kind != "block" else (0, 0)
    added = sum(p.numel() for p in part.parameters())
    r, expected = getattr(part, "r", None), part.expected_parameters()
    path = target.path if target.kind == "param" else path
    return Row(path, type(part).__name__, r, sizes[0], sizes[1], expected, added)


def count(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; of 4-bit weights the numbers they hold, not the bytes."""
    trainable = total = 0
    for parameter in model.parameters():
        size = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            size *= 2 * parameter.element_size()
        total += size
        trainable += size if parameter.requires_grad else 0
    return trainable, total
