"""`veneer verify`: does the adapter on disk work?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
Exit status 0 means that it loads, gives the outputs that training recorded, and merges.

Examples:

  veneer verify out                  on the base model that the adapter names

  veneer verify out --model DIR      on this one

  veneer verify out --json
"""


def verify(
    adapter: Annotated[Path, typer.Argument(help="The adapter's directory.")],
    model: Annotated[str | None, typer.Option(help="The base model; else the one the adapter names.")] = None,
    follow_paths: Annotated[bool, typer.Option(help="Follow paths in its config that lead out of DIR.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Reload an adapter onto a fresh base model and check everything about it."""
    from veneer.core.config import TaskType
    from veneer.model.loading import load_base
    from veneer.model.verify import verify as check
    from veneer.terminal import quiet

    quiet()
    base = load_base(adapter, model, task=TaskType.CAUSAL_LM)
    verification = check(adapter, base, follow_paths=follow_paths)
    if as_json:
        typer.echo(json.dumps(verification.as_dict(), indent=2))
    else:
        marks = {True: "ok", False: "FAILED", None: "-"}
        for item in verification.checks:
            typer.echo(f"{marks[item.passed]:<7}{item.name:<14}{item.detail}")
    verification.check()


verify.__doc__ = (verify.__doc__ or "") + "\n" + EXAMPLES
