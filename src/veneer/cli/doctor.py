"""`veneer doctor`: the environment, and whether another program can run an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from veneer.report.deployment import Diagnosis
    from veneer.report.environment import Environment

EXAMPLES = """
Exit status 1: the program cannot run the adapter as it is, or something in the environment is in the way.

Examples:

  veneer doctor                                versions (and those tried), processors, memory

  veneer doctor my-adapter --for vllm          what it would refuse, or run wrongly in silence, and the way out

  veneer doctor my-adapter --for llama.cpp --json
"""


def doctor(
    adapter: Annotated[Path | None, typer.Argument(help="An adapter's directory.")] = None,
    target: Annotated[str | None, typer.Option("--for", help="vllm, llama.cpp or peft.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report on the environment, or on what keeps a program from running an adapter."""
    if (adapter is None) != (target is None):
        raise typer.BadParameter("give an adapter and --for together, or neither")
    if adapter is None:
        from veneer.report.environment import environment

        here = environment()
        typer.echo(json.dumps(here.as_dict(), indent=2)) if as_json else _show_environment(here)
        raise typer.Exit(1 if here.problems else 0)
    from veneer.report.deployment import diagnose

    found = diagnose(adapter, str(target))
    typer.echo(json.dumps(found.as_dict(), indent=2)) if as_json else _show(found)
    raise typer.Exit(0 if found.runs else 1)


doctor.__doc__ = (doctor.__doc__ or "") + "\n" + EXAMPLES


def _show(found: Diagnosis) -> None:
    from veneer.report.inspection import printable

    for finding in found.findings:
        typer.echo(f"{'no ' if finding.blocks else 'note'} {printable(finding.what)}")
        typer.echo(f"     {printable(finding.fix)}")
    verdict = "runs" if found.runs else "does not run"
    typer.echo(
        f"{printable(found.adapter)} ({found.method}) {verdict} in {found.target}"
        + (" as it is" if not found.runs else "")
    )


def _show_environment(here: Environment) -> None:
    from veneer.terminal import size

    lines = {"veneer": here.veneer, "python": here.python, "system": here.system}
    lines |= {name: _version(here, name) for name in here.packages}
    lines |= {
        "processors": f"{here.processors}, torch uses {here.torch_threads} threads",
        "accelerators": ", ".join(here.accelerators) or "none",
        "memory": f"{size(here.memory_bytes)}, {size(here.free_bytes)} free",
        "cache": f"{here.cache} ({', '.join(here.models) or 'empty'})",
        "hub": "offline (HF_HUB_OFFLINE)" if here.offline else "asked when a name is no directory",
    }
    for name, text in lines.items():
        typer.echo(f"{name:<23}{text}")
    for note in here.untried:
        typer.secho(f"{'untried':<23}{note}", fg=typer.colors.YELLOW)
    for problem in here.problems:
        typer.secho(f"{'problem':<23}{problem}", fg=typer.colors.RED)


def _version(here: Environment, name: str) -> str:
    """The installed version of a library, and which were tried."""
    version = here.packages[name] or "-"
    tried = here.tried.get(name)
    return version if tried is None else f"{version:<14}tried with {tried}"
