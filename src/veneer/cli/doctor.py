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
        _check_environment(as_json)
    else:
        _check_adapter(adapter, str(target), as_json)


doctor.__doc__ = (doctor.__doc__ or "") + "\n" + EXAMPLES


def _check_environment(as_json: bool) -> None:
    from veneer.report.environment import environment

    here = environment()
    if as_json:
        typer.echo(json.dumps(here.as_dict(), indent=2))
    else:
        _show_environment(here)
    raise typer.Exit(1 if here.problems else 0)


def _check_adapter(adapter: Path, target: str, as_json: bool) -> None:
    from veneer.report.deployment import diagnose

    diagnosis = diagnose(adapter, target)
    if as_json:
        typer.echo(json.dumps(diagnosis.as_dict(), indent=2))
    else:
        _show_diagnosis(diagnosis)
    raise typer.Exit(0 if diagnosis.runs else 1)


def _show_diagnosis(diagnosis: Diagnosis) -> None:
    from veneer.report.inspection import printable

    for finding in diagnosis.findings:
        mark = "no " if finding.blocks else "note"
        typer.echo(f"{mark} {printable(finding.what)}")
        typer.echo(f"     {printable(finding.fix)}")
    subject = f"{printable(diagnosis.adapter)} ({diagnosis.method})"
    if diagnosis.runs:
        typer.echo(f"{subject} runs in {diagnosis.target}")
    else:
        typer.echo(f"{subject} does not run in {diagnosis.target} as it is")


def _show_environment(here: Environment) -> None:
    from veneer.terminal import size

    lines = {"veneer": here.veneer, "python": here.python, "system": here.system}
    for name in here.packages:
        lines[name] = _version(here, name)
    models = ", ".join(here.models) or "empty"
    lines["processors"] = f"{here.processors}, torch uses {here.torch_threads} threads"
    lines["accelerators"] = ", ".join(here.accelerators) or "none"
    lines["memory"] = f"{size(here.memory_bytes)}, {size(here.free_bytes)} free"
    lines["cache"] = f"{here.cache} ({models})"
    lines["hub"] = "offline (HF_HUB_OFFLINE)" if here.offline else "asked when a name is no directory"
    for name, text in lines.items():
        typer.echo(f"{name:<23}{text}")
    for note in here.untried:
        typer.secho(f"{'untried':<23}{note}", fg=typer.colors.YELLOW)
    for problem in here.problems:
        typer.secho(f"{'problem':<23}{problem}", fg=typer.colors.RED)


def _version(here: Environment, name: str) -> str:
    """The installed version of a library, and the tried ones."""
    version = here.packages[name] or "-"
    tried = here.tried.get(name)
    return version if tried is None else f"{version:<14}tried with {tried}"
