"""`veneer methods`: list the methods, or describe one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from veneer.model.catalogue import Page

EXAMPLES = """
The table shows for each method whether it merges into the weights, whether
its update is of low rank, the learning rate to start from, the paper, the
kinds of modules it adapts, what it does, and its formula.

Examples:

  # all methods
  veneer methods

  # one method, with all its settings and their defaults
  veneer methods hira

  # also the number of parameters that each trains on a model
  veneer methods --model smollm2-135m-instruct

  # the same for an architecture, without a download, for scripts
  veneer methods --model-type gpt2 --json
"""


def methods(
    name: Annotated[str | None, typer.Argument(help="Describe this method.", show_default="list all")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Count the trainable parameters on this model: a directory, a name that `veneer pull` knows, or a hub "
            "id. Only its config is read."
        ),
    ] = None,
    model_type: Annotated[
        str | None,
        typer.Option(
            help="Count them on an architecture in transformers' default size instead, such as gpt2 or llama."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List the methods, or describe one: formula, paper, settings."""
    from veneer.model.catalogue import page, pages

    shown = [page(name)] if name else list(pages().values())
    counts = _counts(shown, model, model_type)
    if as_json:
        rows = [_as_dict(p, counts) for p in shown]
        typer.echo(json.dumps(rows[0] if name else rows, indent=2, default=str))
    elif name:
        _show_page(shown[0], counts)
    else:
        _show_table(shown, counts)


methods.__doc__ = (methods.__doc__ or "") + "\n" + EXAMPLES


def _as_dict(p: Page, counts: dict[str, int | None]) -> dict[str, Any]:
    content = p.as_dict()
    if counts:
        content["trainable"] = counts[p.name]
    return content


def _counts(shown: list[Page], model: str | None, model_type: str | None) -> dict[str, int | None]:
    """Trainable parameters of each method on a model; empty if no model is given."""
    if model is None and model_type is None:
        return {}
    from veneer.files.skeleton import skeleton
    from veneer.model.catalogue import trainable

    base = skeleton(model, model_type)
    return {p.name: trainable(p.name, base) for p in shown}


def _show_table(shown: list[Page], counts: dict[str, int | None]) -> None:
    """Print three lines for each method: its facts, its claim, its formula."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    columns = "{:<18} {:>11}  {:<6} {:<4} {:>6}  {:<17} {}"
    heading = columns.format("method", "trainable" if counts else "", "merges", "rank", "rate", "paper", "adapts")
    console.print(Text(heading, style="bold"), overflow="ellipsis", no_wrap=True)
    indent = (0, 0, 0, 4)
    for p in shown:
        count = _number(counts[p.name]) if counts else ""
        merges = "yes" if p.mergeable else "-"
        rank = "low" if p.low_rank else "-"
        kinds = ", ".join(p.kinds)
        line = Text(columns.format(p.name, count, merges, rank, f"{p.learning_rate:g}", p.paper, kinds))
        line.stylize("bold cyan", 0, len(p.name))
        console.print(line, overflow="ellipsis", no_wrap=True)
        console.print(Padding(Text(_claim(p.claim)), indent))
        formula = p.formula.partition("\n")[0]
        console.print(Padding(Text(formula, style="dim"), indent))
    console.print(f"{len(shown)} methods. `veneer methods NAME` describes one.", highlight=False)


def _claim(claim: str) -> str:
    """The claim without the method's name in front."""
    return claim.partition(": ")[2] or claim


def _show_page(p: Page, counts: dict[str, int | None]) -> None:
    typer.echo(p.text)
    typer.echo(f"\nConfig: {p.config}; adapts {', '.join(p.kinds)}; learning rate {p.learning_rate:g}")
    if p.recommended:
        typer.echo(f"Settings that `veneer train` uses by default: {_settings(p.recommended)}")
    if counts:
        typer.echo(f"Trainable parameters on this model: {_number(counts[p.name])}")
    typer.echo("\nSettings:")
    for field in p.fields:
        typer.echo(f"  {field.name} = {field.default!r}\n      {field.about}")


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())


def _number(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"
