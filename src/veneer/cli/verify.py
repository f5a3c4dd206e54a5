"""`veneer verify`: check that the adapter on disk works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ._options import AllowAbsent, Base

EXAMPLES = """
Checks that the files load, that no tensor is all zero, that training
changed every tensor, that the outputs are those that training recorded, and
that merging gives the same outputs. Without a record of the training run,
the checks that need it are skipped.

Exit status 0: every check passed or was skipped; 2: a check failed.

Examples:

  # on the base model that the adapter names
  veneer verify my-adapter

  # on another copy of it
  veneer verify my-adapter --model DIR

  veneer verify my-adapter --json
"""


def verify(
    adapter: Annotated[Path, typer.Argument(help="Directory of the adapter.")],
    model: Base = None,
    follow_paths: Annotated[
        bool,
        typer.Option(
            help="Allow paths in the adapter's config that lead out of its directory, such as those of X-LoRA's "
            "experts. Use it only for adapters that you trust."
        ),
    ] = False,
    allow_absent: AllowAbsent = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check a saved adapter by loading it onto a fresh base model."""
    from veneer.core.config import TaskType
    from veneer.model.loading import load_base, quantised_in_training
    from veneer.model.verify import verify as check
    from veneer.terminal import quiet

    quiet()
    base = load_base(adapter, model, task=TaskType.CAUSAL_LM, quantise=quantised_in_training(adapter))
    verification = check(adapter, base, follow_paths=follow_paths, allow_absent=allow_absent)
    if as_json:
        typer.echo(json.dumps(verification.as_dict(), indent=2))
    else:
        marks = {True: "ok", False: "FAILED", None: "-"}
        for item in verification.checks:
            typer.echo(f"{marks[item.passed]:<7}{item.name:<14}{item.detail}")
    verification.check()


verify.__doc__ = (verify.__doc__ or "") + "\n" + EXAMPLES
