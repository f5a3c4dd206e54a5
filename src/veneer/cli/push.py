"""`veneer push`: upload an adapter to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
Uploads the adapter, its model card and its training report. Paths of this
machine are left out. A repository that does not exist is created, and is
private unless --public is given. Needs a token of the hub: `hf auth login`.

Examples:

  veneer push my-adapter owner/name

  # the same at the end of a run
  veneer train recipe.yaml --push-to-hub owner/name
"""


def push(
    adapter: Annotated[Path, typer.Argument(help="Directory of the adapter.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="If the repository is created, make it public.")] = False,
) -> None:
    """Upload an adapter, its card and its report to the Hugging Face hub."""
    from veneer.terminal import quiet
    from veneer.train.push import check_token
    from veneer.train.push import push as upload
    from veneer.train.recipe import REPOSITORY

    if not REPOSITORY.fullmatch(repository):
        from veneer.errors import ConfigError

        raise ConfigError(f"{repository!r} must be OWNER/NAME")
    quiet()
    check_token(repository)
    typer.echo(upload(adapter, repository, private=not public))


push.__doc__ = (push.__doc__ or "") + "\n" + EXAMPLES
