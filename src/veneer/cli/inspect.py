"""`veneer inspect`: show what an adapter's files contain."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.report.inspection import Inspection, LayerFacts

EXAMPLES = """
Begins with a summary: method, base model, settings, size, adapted modules,
ranks, the smallest and largest update, and problems. Then lists for each
adapted module the rank, the effective rank and the norm of the update. Reads
only the adapter's own files, runs no code from them, and lists damaged or
contradictory content as problems.

Examples:

  veneer inspect my-adapter

  # also every tensor of the file
  veneer inspect my-adapter --tensors

  # for scripts
  veneer inspect my-adapter --json
"""


def inspect(
    adapter: Annotated[Path, typer.Argument(help="Directory of the adapter.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="Also list every tensor: shape, dtype and norm.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what an adapter's files contain, and any problems with them."""
    from veneer.report.inspection import inspect as look

    inspection = look(adapter)
    if as_json:
        typer.echo(json.dumps(inspection.as_dict(), indent=2, default=str))
    else:
        _show(inspection, tensors)


inspect.__doc__ = (inspect.__doc__ or "") + "\n" + EXAMPLES


def _show(inspection: Inspection, tensors: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from veneer.report.inspection import printable
    from veneer.terminal import size

    console = Console(highlight=False)
    settings = []
    for name, value in inspection.settings.items():
        if value not in (None, {}, False):
            settings.append(f"{name}={printable(value)}")
    lines = {"method": inspection.method, "base": inspection.base or "not named"}
    if inspection.base_file:
        lines["base file"] = inspection.base_file
    lines["settings"] = ", ".join(settings)
    file_size = size(inspection.file_bytes)
    lines["tensors"] = f"{len(inspection.tensors)}, {inspection.count:,} parameters, file {file_size}"
    lines |= _of_updates(inspection.layers)
    for name, text in lines.items():
        console.print(Text(f"{name:<10}{text}"))
    for problem in inspection.problems:
        console.print(Text(f"problem: {problem}", style="red"))
    if not inspection.problems:
        console.print(Text("no problems found", style="green"))
    if inspection.layers:
        console.print()
        _show_layers(console, inspection)
    if tensors:
        console.print()
        for t in inspection.tensors:
            console.print(Text(f"{t.key}  {list(t.shape)} {t.dtype}  norm {t.norm:.4g}"))


def _of_updates(layers: list[LayerFacts]) -> dict[str, str]:
    """The lines of the summary about the adapted modules: how many of each name, their ranks and norms."""
    lines = {}
    names = Counter(layer.path.rpartition(".")[2] for layer in layers if layer.path)
    if names:
        counts = ", ".join(f"{count} {name}" for name, count in names.items())
        lines["modules"] = f"{names.total()}: {counts}"
    parts = {layer.parts for layer in layers}
    if len(parts) == 1:
        lines["parts"] = ", ".join(parts.pop())
    measured = [layer for layer in layers if layer.norm is not None]
    if measured:
        ranks = _range(measured, "rank")
        effective_ranks = _range(measured, "effective_rank")
        lines["rank"] = f"{ranks}, effective rank {effective_ranks}"
        by_norm = sorted(measured, key=lambda layer: layer.norm or 0.0)
        smallest = f"{_number(by_norm[0].norm)} ({by_norm[0].path})"
        largest = f"{_number(by_norm[-1].norm)} ({by_norm[-1].path})"
        lines["updates"] = f"norm {smallest} to {largest}" if len(by_norm) > 1 else f"norm {smallest}"
    return lines


def _range(layers: Sequence[LayerFacts], measure: str) -> str:
    """The smallest and the largest value of a measure; one of them if both look the same."""
    values = sorted(map(attrgetter(measure), layers))
    low = _number(values[0])
    high = _number(values[-1])
    return low if low == high else f"{low} to {high}"


def _show_layers(console: Console, inspection: Inspection) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    texts = ["module"]
    if len({layer.parts for layer in inspection.layers}) > 1:  # else the summary has them
        texts.append("parts")
    for name in texts:
        table.add_column(name, justify="left", overflow="fold", vertical="bottom")
    for name in ("parameters", "rank", "effective\nrank", "update\nnorm"):
        table.add_column(name, justify="right", overflow="fold")
    for layer in inspection.layers:
        cells = [Text(layer.path or "-"), Text(", ".join(layer.parts))][: len(texts)]
        ranks = (_number(layer.rank), _number(layer.effective_rank))
        table.add_row(*cells, f"{layer.count:,}", *ranks, _number(layer.norm))
    console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
