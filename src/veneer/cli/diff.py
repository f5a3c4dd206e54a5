"""`veneer diff`: compare two adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from veneer.report.comparison import Difference

EXAMPLES = """
Begins with a summary. Then lists the settings that differ, the tensors that
only one adapter has or whose values differ, and for each adapted layer the
cosine and the norms of the two updates.

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

    if difference.is_none:
        typer.echo(f"the same: every setting, and all {difference.same} tensors bit for bit")
        return
    for line in _summary(difference):
        typer.echo(line)
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


def _summary(difference: Difference) -> list[str]:
    """How many settings and tensors differ, and how far the updates point apart."""
    settings = len(difference.fields)
    lines = [f"settings  {settings} differ" if settings else "settings  equal"]
    counts = {
        "equal": difference.same,
        "changed": len(difference.changed),
        "of other shapes": len(difference.other_shape),
        "only in the first": len(difference.only_first),
        "only in the second": len(difference.only_second),
    }
    tensors = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    lines.append(f"tensors   {tensors or 'none'}")
    cosines = [angle.cosine for angle in difference.angles]
    if cosines:
        mean = sum(cosines) / len(cosines)
        spread = f"mean {mean:+.3f}, lowest {min(cosines):+.3f}, highest {max(cosines):+.3f}"
        lines.append(f"updates   {len(cosines)} compared, cosine {spread}")
    return [*lines, ""]
