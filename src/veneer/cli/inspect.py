"""`veneer inspect`: what is in an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from veneer.report.inspection import Inspection

EXAMPLES = """
Examples:

  veneer inspect out                 method, base, sizes, layers, problems

  veneer inspect out --tensors       with every tensor of the file

  veneer inspect out --json          for a script
"""


def inspect(
    adapter: Annotated[Path, typer.Argument(help="The adapter's directory.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="Show every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look into an adapter's files, without its base model and without trusting them."""
    from veneer.report.inspection import inspect as look

    found = look(adapter)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2, default=str))
    else:
        _show(found, tensors)


inspect.__doc__ = (inspect.__doc__ or "") + "\n" + EXAMPLES


def _show(found: Inspection, tensors: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from veneer.report.inspection import printable
    from veneer.terminal import size

    console = Console(highlight=False)
    settings = {name: value for name, value in found.settings.items() if value not in (None, {}, False)}
    lines = {
        "method": found.method,
        "base": found.base or "not named",
        "settings": ", ".join(f"{name}={printable(value)}" for name, value in settings.items()),
        "tensors": f"{len(found.tensors)}, {found.count:,} numbers, file {size(found.file_bytes)}",
    }
    for name, text in lines.items():
        console.print(Text(f"{name:<10}{text}"))
    if found.layers:
        _show_layers(console, found)
    for t in found.tensors if tensors else ():
        console.print(Text(f"{t.key}  {list(t.shape)} {t.dtype}  norm {t.norm:.4g}"))
    for problem in found.problems:
        console.print(Text(f"problem: {problem}", style="red"))
    if not found.problems:
        console.print(Text("no problems found", style="green"))


def _show_layers(console: object, found: Inspection) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("module", "parts", "numbers", "rank", "effective", "update norm"):
        table.add_column(name, justify="left" if name in ("module", "parts") else "right", overflow="fold")
    for layer in found.layers:
        facts = [f"{layer.count:,}", _number(layer.rank), _number(layer.effective_rank), _number(layer.norm)]
        table.add_row(Text(layer.path or "-"), Text(", ".join(layer.parts)), *facts)
    console.print(table)  # type: ignore[attr-defined]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
