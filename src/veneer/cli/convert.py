"""`veneer convert`: a LoRA adapter in another project's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
Layouts: peft, adapterhub, mlx, torchtune, loralib, kohya. Numbers are kept bit for bit; what a layout cannot hold is
refused. Adapters of other methods become LoRAs first: veneer.save_as_lora.

Examples:

  veneer convert my-adapter for-mac --to mlx

  veneer convert for-mac back --to peft              the layout of the source is found

  veneer convert run out --to peft --allow-pickle    a .pt or .bin that you trust; only tensors are taken

  veneer convert loralib-run out --to peft --alpha 16 --enabled true,false,true
"""


def convert(
    source: Annotated[Path, typer.Argument(help="The adapter's directory.")],
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    to: Annotated[str, typer.Option(help="The layout to write.")],
    from_: Annotated[str | None, typer.Option("--from", help="The layout of the source; else it is found.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model, where a layout depends on it (config only).")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="alpha, where the source does not say it (loralib).")] = None,
    enabled: Annotated[str | None, typer.Option(help="loralib's enable_lora of fused projections.")] = None,
    prefix: Annotated[str | None, typer.Option(help="What kohya's keys begin with (lora_unet, lora_te).")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .pt and .bin, tensors only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Convert a LoRA adapter between the layouts of PEFT, AdapterHub, mlx-lm, torchtune, loralib and kohya."""
    from veneer.formats.conversion import convert as run
    from veneer.formats.lora import Hints

    hints = Hints(model, alpha, _booleans(enabled), prefix, allow_pickle)
    done = run(source, out, to, from_, hints)
    if as_json:
        typer.echo(json.dumps(done.as_dict(), indent=2))
    else:
        typer.echo(f"{done.source} ({done.layout}) -> {done.out} ({done.wanted})")
        typer.echo(f"{done.modules} modules, {done.parameters:,} numbers, bit for bit")


convert.__doc__ = (convert.__doc__ or "") + "\n" + EXAMPLES


def _booleans(text: str | None) -> list[bool] | None:
    if text is None:
        return None
    words = [word.strip().lower() for word in text.split(",")]
    if not set(words) <= {"true", "false"}:
        raise typer.BadParameter(f"--enabled {text!r} must be true and false, separated by commas")
    return [word == "true" for word in words]
