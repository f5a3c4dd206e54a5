"""`veneer pull`: fetch a small model into the cache."""

from typing import Annotated

import typer

from veneer.files.pull import DEFAULT, MODELS
from veneer.files.pull import pull as fetch


def pull(
    name: Annotated[str, typer.Argument(help="A name that --list shows.")] = DEFAULT,
    listing: Annotated[bool, typer.Option("--list", help="Show the models that can be pulled.")] = False,
) -> None:
    """Download a small model, verify it, and print the local directory to load it from."""
    if listing:
        for known, source in MODELS.items():
            typer.echo(f"{known}  {source.about}")
    else:
        typer.echo(fetch(name))
