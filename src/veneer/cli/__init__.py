"""The command `veneer`: one file per verb in this folder, each with a function of the file's name.

No module here imports torch or transformers at its top: `veneer --help` must answer at once. A verb imports what it
needs when it runs.
"""

import importlib
import logging
import os
import pkgutil
import sys
import warnings
from typing import Annotated, Any

import typer

from veneer.cli._command import Command, Group

HELP = {"help_option_names": ["--help", "-h"]}

app = typer.Typer(
    cls=Group,
    context_settings=HELP,
    help="Parameter-efficient fine-tuning: LoRA and others, in Hugging Face PEFT's file format.",
    epilog="`veneer COMMAND --help` explains a command. With VENEER_DEBUG=1, errors show their traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(is_set: bool) -> None:
    if not is_set:
        return
    from veneer import __version__

    typer.echo(f"veneer {__version__}")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for _verb in pkgutil.iter_modules(__path__):
    if not _verb.name.startswith("_"):
        _module = importlib.import_module(f"{__name__}.{_verb.name}")
        app.command(_verb.name.replace("_", "-"), cls=Command, context_settings=HELP)(getattr(_module, _verb.name))


def main() -> None:
    """Run the command line. An error that the user can fix gives one line on stderr and exit status 2, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal or a pipe may lack some characters
            stream.reconfigure(errors="replace")
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # these log advice on import
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app(prog_name="veneer")
    except SystemExit as stop:
        if stop.code == 130:  # typer exits silently with 130 on KeyboardInterrupt
            print("interrupted", file=sys.stderr)
        raise
    except (ValueError, OSError) as error:
        if os.environ.get("VENEER_DEBUG") == "1":
            raise
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        for note in _notes(error):
            typer.secho(note, fg=typer.colors.YELLOW, err=True)
        raise SystemExit(2) from None


def _show_warning(message: Any, *place: Any, **more: Any) -> None:
    """Show a warning without its place in the code, which is of no use on a command line."""
    typer.secho(f"warning: {message}", fg=typer.colors.YELLOW, err=True)


def _notes(error: Exception) -> list[str]:
    """Lines to print after an error: the error's notes, or a remark on untested library versions."""
    from veneer.upstream.versions import remark

    notes = getattr(error, "__notes__", None)
    if notes:
        return notes
    line = remark()
    return [line] if line else []
