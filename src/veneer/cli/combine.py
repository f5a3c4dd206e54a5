"""`veneer combine`: write a weighted sum of adapters as one LoRA."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from veneer.errors import ConfigError

EXAMPLES = """
Computes the weighted sum of the adapters' updates of the base weights. The
adapters may differ in rank, targets and method; a negative weight subtracts.
The result is a plain LoRA. Adapters that are LoRAs are combined from their
files alone; other methods also need the base model.

Values of --method:

  svd               the best approximation of the sum with rank --rank
  cat               the exact sum; its rank is the sum of the ranks
  ties, dare_ties, dare_linear, magnitude_prune
                    keep only a share of each update (--density), then add

Examples:

  # a weighted mean
  veneer combine first second --weights 0.7,0.3 --out both

  # what the first adapter does and the second does not
  veneer combine first second --weights 1,-1 --method cat --out difference

  # TIES with three adapters, keeping 20% of each
  veneer combine a b c --weights 1,1,1 --method ties --density 0.2 --out three
"""


def combine(
    adapters: Annotated[list[str], typer.Argument(help="Directories of adapters that were trained on one base model.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Directory for the result; it must be empty or not exist.")],
    weights: Annotated[str, typer.Option(help="One weight per adapter, separated by commas: 0.7,0.3.")],
    method: Annotated[str, typer.Option(help="How the updates are added; see above.")] = "svd",
    rank: Annotated[
        int | None, typer.Option(help="Rank of the result.", show_default="the highest rank of the adapters")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Share of the entries of each update that pruning keeps, in (0, 1]. Required for pruning."),
    ] = None,
    election: Annotated[
        str,
        typer.Option(
            help="How TIES chooses the sign of an entry: total (the sign of the sum) or frequency (the sign that most "
            "adapters have)."
        ),
    ] = "total",
    clamp: Annotated[
        float | None,
        typer.Option(help="Clamp the entries of the result's factors to this quantile of their magnitudes, 0 to 1."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The base model, needed if an adapter is not a LoRA.", show_default="the model that the adapters name"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for the entries that DARE drops.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Combine adapters into one LoRA, as a weighted sum."""
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
        raise ConfigError(f"--weights {text!r} must be numbers separated by commas, one for each adapter") from None
