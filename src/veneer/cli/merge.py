"""`veneer merge`: merge adapters into their base model, from files to files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ._options import AllowAbsent, Base

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.merging.merge import MergeReport
    from veneer.merging.merger import Rounded

EXAMPLES = """
Writes a plain transformers model that needs no veneer. The base model is
read and written one module at a time, so that it may be larger than memory.
Updates are added in fp32 and rounded once, to the dtype of the base's
files. Nothing is overwritten, and an error leaves no files behind.

Examples:

  # merge into the base model that the adapter names
  veneer merge my-adapter --out merged

  # several adapters, in the order in which they apply
  veneer merge first second --out merged

  # merge into the base model in a directory
  veneer merge my-adapter --out merged --model DIR

  # report what rounding lost, tensor by tensor
  veneer merge my-adapter --out merged --json
"""


def merge(
    adapters: Annotated[
        list[str], typer.Argument(help="Directories or hub ids of adapters, in the order in which they apply.")
    ],
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Directory for the merged model; it must be empty or not exist.")
    ],
    model: Base = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show the rounding loss of every merged tensor.")] = False,
    check_base: Annotated[
        bool, typer.Option(help="Refuse a base model other than the one that an adapter was trained on.")
    ] = True,
    allow_absent: AllowAbsent = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Merge adapters into their base model and save a plain model."""
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
            allow_absent=allow_absent,
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
    console.print(
        f"rounding  {report.lost:.2%} of the change lost; {report.unmoved:.1%} of the changed weights kept their value"
    )
    if report.earlier:
        console.print(f"earlier   {report.earlier} was merged first, with all below it", markup=False, soft_wrap=True)
    if report.quantised:
        console.print(
            f"base      it was quantised to {report.quantised} in training; merged are the unquantised weights, so the "
            "answers may differ (`veneer eval --quantise none` measures by how much)",
            soft_wrap=True,
        )
    if report.untied:
        console.print("untied    the base's tied weights now differ; the config records it")


def _print_table(console: Console, heading: str, tensors: list[Rounded]) -> None:
    """Print the rounding loss of each tensor; nothing for an empty list."""
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
