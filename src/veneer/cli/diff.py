"""`veneer diff`: two adapters side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from veneer.report.comparison import Difference

EXAMPLES = """
Exit status 0: the same in every setting and every bit; 1: they differ.

Examples:

  veneer diff run-1 run-2            settings, tensors, angle between the updates

  veneer diff run-1 run-2 --json
"""


def diff(
    first: Annotated[Path, typer.Argument(help="An adapter's directory.")],
    second: Annotated[Path, typer.Argument(help="Another's.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two adapters: settings, tensors, and the direction of their updates."""
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
