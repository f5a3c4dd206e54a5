"""`veneer combine`: a weighted sum of adapters as one."""

from __future__ import annotations

import json
from typing import Annotated

import typer

EXAMPLES = """
The result is a plain LoRA. Weights may be negative; ranks, targets and methods may differ. LoRAs need no base model.

Methods: "cat" is the exact sum, of the ranks' sum; "svd" its best form of one rank; "ties", "dare_linear", "dare_ties"
and "magnitude_prune" keep a share of the entries (--density) before they add.

Examples:

  veneer combine first second --weights 0.7,0.3 --out both

  veneer combine first second --weights 1,-1 --method cat --out difference

  veneer combine a b c --weights 1,1,1 --method ties --density 0.2 --rank 16 --out three
"""


def combine(
    adapters: Annotated[list[str], typer.Argument(help="Directories of adapters of one base model.")],
    out: Annotated[str, typer.Option(help="A new directory.")],
    weights: Annotated[str, typer.Option(help="One for each adapter, as 0.7,0.3.")],
    method: Annotated[str, typer.Option(help="How they are added.")] = "svd",
    rank: Annotated[int | None, typer.Option(help="Rank of the result; else the highest of the adapters.")] = None,
    density: Annotated[float | None, typer.Option(help="The share of entries that pruning keeps.")] = None,
    election: Annotated[str, typer.Option(help='The sign that TIES elects: "total" or "frequency".')] = "total",
    clamp: Annotated[float | None, typer.Option(help="A quantile that the result's entries are clamped to.")] = None,
    model: Annotated[str | None, typer.Option(help="The base model, where it is needed and not named.")] = None,
    seed: Annotated[int, typer.Option(help="Of what DARE drops.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Add adapters with weights into one new LoRA."""
    from veneer.merging.combine import combine as run

    done = run(adapters, _numbers(weights), out, method, rank, density, election, clamp, model, seed)
    if as_json:
        typer.echo(json.dumps(done.as_dict(), indent=2))
        return
    terms = [f"{weight:g} x {adapter}" for weight, adapter in zip(done.weights, done.adapters, strict=True)]
    typer.echo(f"{done.out} = {' + '.join(terms)}")
    files = "with the base's weights" if done.with_base else "from the adapters' files alone"
    typer.echo(f"{done.modules} modules, rank {done.rank}, by {done.method!r}, {files}")


combine.__doc__ = (combine.__doc__ or "") + "\n" + EXAMPLES


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--weights {text!r} must be numbers, separated by commas") from None
