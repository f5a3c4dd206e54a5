"""`veneer convert`: write a LoRA adapter in another project's file layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from veneer.errors import ConfigError

EXAMPLES = """
Layouts: peft, adapterhub, mlx, torchtune, loralib, kohya. The parameters
are copied bit for bit; an adapter that a layout cannot store is refused.
To convert an adapter of another method, first turn it into a plain LoRA:
veneer combine my-adapter --weights 1 --out as-lora.

Examples:

  # from PEFT's layout, which is also veneer's, to that of mlx-lm
  veneer convert my-adapter for-mac --to mlx

  # and back; the layout of the source is detected
  veneer convert for-mac back --to peft

  # read a .pt or .bin file that you trust
  veneer convert run out --to peft --allow-pickle

  # loralib stores neither alpha nor the parts of a fused projection
  veneer convert run out --to peft --alpha 16 --enabled true,false,true
"""


def convert(
    source: Annotated[Path, typer.Argument(help="The adapter's directory.")],
    out: Annotated[Path, typer.Argument(help="Directory for the result; it must be empty or not exist.")],
    to: Annotated[str, typer.Option(metavar="LAYOUT", help="The layout to write; see above.")],
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="LAYOUT", help="The layout of the source.", show_default="detected"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The base model, for layouts that depend on it; only its config is read.",
            show_default="the model that the adapter names",
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="lora_alpha, if the files do not record it (loralib's do not).")
    ] = None,
    enabled: Annotated[
        str | None,
        typer.Option(
            metavar="BOOLS",
            help="loralib's enable_lora: which parts of a fused projection are adapted, such as true,false,true.",
        ),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Start of the keys in kohya's layout, such as lora_unet or lora_te.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .pt and .bin files; only their tensors are loaded.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Convert a LoRA adapter to or from another project's file layout."""
    from veneer.formats.conversion import convert as run
    from veneer.formats.lora import Hints

    hints = Hints(model, alpha, _booleans(enabled), prefix, allow_pickle)
    done = run(source, out, to, from_, hints)
    if as_json:
        typer.echo(json.dumps(done.as_dict(), indent=2))
    else:
        typer.echo(f"{done.source} ({done.layout}) -> {done.out} ({done.wanted})")
        typer.echo(f"{done.modules} modules, {done.parameters:,} parameters, bit for bit")


convert.__doc__ = (convert.__doc__ or "") + "\n" + EXAMPLES


def _booleans(text: str | None) -> list[bool] | None:
    if text is None:
        return None
    words = [word.strip().lower() for word in text.split(",")]
    if not set(words) <= {"true", "false"}:
        raise ConfigError(f"--enabled {text!r} must be a list of true and false, separated by commas")
    return [word == "true" for word in words]
