"""`veneer merge`: adapters and their base as one plain model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.merging.merge import MergeReport
    from veneer.merging.merger import Rounded

EXAMPLES = """
The base is read and the result written a module at a time, so that a model larger than memory merges. Sums are in fp32
and rounded once, to the dtype of the base's files. Nothing is overwritten, and after an error nothing is left.

Examples:

  veneer merge my-adapter --out merged               into the base that the adapter names

  veneer merge first second --out merged             several, in the order they act

  veneer merge my-adapter --out merged --model DIR   into this base

  veneer merge my-adapter --out merged --json        what rounding took, tensor by tensor
"""


def merge(
    adapters: Annotated[list[str], typer.Argument(help="Directories or hub ids of adapters, innermost first.")],
    out: Annotated[str, typer.Option(help="A new directory for the merged model.")],
    model: Annotated[str | None, typer.Option(help="The base model; else the one the adapters name.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show every tensor.")] = False,
    check_base: Annotated[bool, typer.Option(help="Refuse a base other than the adapters' own.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Merge adapters into their base model's files: a plain transformers model, without veneer."""
    from rich.console import Console
    from rich.progress import Progress

    from veneer.merging.merge import merge as run

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=as_json or not console.is_terminal) as bar:
        task = bar.add_task("merging", total=None)
        report = run(
            adapters,
            out,
            model,
            check_base=check_base,
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        _show(report, layers)


merge.__doc__ = (merge.__doc__ or "") + "\n" + EXAMPLES


def _show(report: MergeReport, layers: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if layers:
        _print_table(console, "tensor", report.tensors)
    else:
        worst = sorted(report.tensors, key=lambda t: t.lost, reverse=True)
        _print_table(console, "most lost to rounding", [t for t in worst[:5] if t.lost > 0])
    console.print(f"merged    {len(report.tensors)} tensors of {report.base} into {report.out}")
    console.print(f"rounding  {report.lost:.2%} of the change lost; {report.unmoved:.1%} of its numbers did not move")
    if report.untied:
        console.print("untied    the base's tied weights have values of their own now, and the config says so")


def _print_table(console: Console, heading: str, tensors: list[Rounded]) -> None:
    """Print what merging did to each tensor; nothing if there are none."""
    from rich.table import Table
    from rich.text import Text

    if not tensors:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (heading, "dtype"):
        table.add_column(name, justify="left")
    for name in ("norm of dW", "lost", "unmoved"):
        table.add_column(name, justify="right")
    for t in tensors:
        unmoved = f"{t.unmoved / t.moved:.1%}" if t.moved else "-"
        table.add_row(Text(t.name), t.dtype, f"{t.change:.3g}", f"{t.lost:.2%}", unmoved)
    console.print(table)
