"""`veneer diff`: compare two adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from veneer.report.comparison import Difference

EXAMPLES = """
Lists the settings that differ, the tensors that only one adapter has or
whose values differ, and for each adapted layer the cosine and the norms of
the two updates.

Exit status 0: both are equal in every setting and bit; 1: they differ.

Examples:

  veneer diff run-1 run-2

  veneer diff run-1 run-2 --json
"""


def diff(
    first: Annotated[Path, typer.Argument(help="Directory of an adapter.")],
    second: Annotated[Path, typer.Argument(help="Directory of the other adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the differences as JSON.")] = False,
) -> None:
    """Compare two adapters: settings, tensors and updates."""
    from veneer.report.comparison import diff as compare

    difference = compare(first, second)
    if as_json:
        typer.echo(json.dumps(difference.as_dict(), indent=2, default=str))
    else:
        _show(difference)
    raise typer.Exit(0 if difference.is_none else 1)


diff.__doc__ = (diff.__doc__ or "") + "\n" + EXAMPLES


def _show(difference: Difference) -> None:
    from veneer.report.inspection import printable

    for name, (a, b) in difference.fields.items():
        typer.echo(f"{name}: {printable(a)} -> {printable(b)}")
    for key in difference.only_first:
        typer.echo(f"- {printable(key)}")
    for key in difference.only_second:
        typer.echo(f"+ {printable(key)}")
    for key in difference.other_shape:
        typer.echo(f"shape {printable(key)}")
    for tensor in difference.changed:
        typer.echo(f"~ {printable(tensor.key)}  differs by {tensor.relative:.3g}")
    for angle in difference.angles:
        a, b = angle.norms
        typer.echo(f"update of {printable(angle.path)}  cosine {angle.cosine:+.3f}  norms {a:.3g}, {b:.3g}")
    if difference.is_none:
        typer.echo("the same")
    else:
        typer.echo(f"{difference.same} tensors are equal, {len(difference.changed)} changed")
