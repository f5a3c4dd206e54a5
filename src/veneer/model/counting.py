"""Parameter counts: of an adapter, layer by layer, and of a whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.state import State


@dataclass(frozen=True)
class Row:
    """The parameters that one adapter adds to one module."""

    path: str
    method: str
    r: int | None
    in_features: int
    out_features: int
    expected: int
    """Trainable parameters by the method's formula: r x (in + out) for LoRA."""
    added: int
    """Parameters counted in the tensors."""

    @property
    def formula(self) -> str:
        """The count as a formula, for methods that count like LoRA; otherwise empty."""
        if self.r is not None and self.expected == self.r * (self.in_features + self.out_features):
            return f"{self.r} x ({self.in_features:,} + {self.out_features:,})"
        return ""


@dataclass(frozen=True)
class Plan:
    """Parameter counts of an adapter by module, and their sums; prints as a table."""

    adapter: str
    rows: tuple[Row, ...]
    other: int
    """Parameters outside the adapted modules: of a prompt or a gate."""

    @property
    def expected(self) -> int:
        return sum(row.expected for row in self.rows) + self.other

    @property
    def total(self) -> int:
        return sum(row.added for row in self.rows) + self.other

    def __str__(self) -> str:
        path_width = max((len(row.path) for row in self.rows), default=10)
        method_width = max((len(row.method) for row in self.rows), default=4)

        def line(path: str, method: str, formula: str, count: int) -> str:
            module = f"{path:<{path_width}}  {method:<{method_width}}"
            return f"{module}  {formula:>22}  {count:>12,}"

        lines = [line(row.path, row.method, row.formula, row.added) for row in self.rows]
        if self.other:
            lines.append(line("other parameters", "", "", self.other))
        lines.append(line("sum", "", "", self.total))
        return "\n".join(lines)


def plan(state: State, name: str) -> Plan:
    """Count an adapter's parameters from its formula and from its tensors."""
    rows = []
    for path, adapter in state.adapters(name).items():
        rows += [_row(path, part) for part in adapter.parts]
    other = 0
    for module in (state.shared.get(name), state.prompts.get(name)):
        if module is not None:
            other += _size(module)
    return Plan(name, tuple(rows), other)


def _row(path: str, part: Any) -> Row:
    target = part.target
    has_features = target.kind != "block"
    return Row(
        path=target.path if target.kind == "param" else path,
        method=type(part).__name__,
        r=getattr(part, "r", None),
        in_features=target.in_features if has_features else 0,
        out_features=target.out_features if has_features else 0,
        expected=part.expected_parameters(),
        added=_size(part),
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count(model: nn.Module) -> tuple[int, int]:
    """Numbers of (trainable, all) parameters; packed 4-bit weights count as the values they hold, not as bytes."""
    trainable = 0
    total = 0
    for parameter in model.parameters():
        size = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            size *= 2 * parameter.element_size()
        total += size
        if parameter.requires_grad:
            trainable += size
    return trainable, total
