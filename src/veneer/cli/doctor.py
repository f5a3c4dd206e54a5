"""`veneer doctor`: check the environment, or whether another program can run an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.report.deployment import Diagnosis
    from veneer.report.environment import Environment

EXAMPLES = """
Without arguments: shows the versions of the libraries and the versions that
veneer is tested with, the processors, the memory, and problems with them.

With an adapter and --for: shows what that program would refuse or compute
wrongly without an error, and how to fix it.

Exit status 0: all is well; 1: the program cannot run the adapter as it is,
or the environment has a problem.

Examples:

  veneer doctor

  veneer doctor my-adapter --for vllm

  veneer doctor my-adapter --for llama.cpp --json
"""


def doctor(
    adapter: Annotated[Path | None, typer.Argument(help="Directory of an adapter; needs --for.")] = None,
    target: Annotated[
        str | None, typer.Option("--for", metavar="PROGRAM", help="vllm, sglang, llama.cpp or peft.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check the environment, or whether a program can run an adapter."""
    if (adapter is None) != (target is None):
        raise ConfigError("an adapter and --for belong together: give both, or neither")
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
    lines["hub"] = "offline (HF_HUB_OFFLINE)" if here.offline else "used for names that are not local directories"
    for name, text in lines.items():
        typer.echo(f"{name:<23}{text}")
    for note in here.untried:
        typer.secho(f"{'untested':<23}{note}", fg=typer.colors.YELLOW)
    for problem in here.problems:
        typer.secho(f"{'problem':<23}{problem}", fg=typer.colors.RED)


def _version(here: Environment, name: str) -> str:
    """The installed version of a library, and the versions that veneer is tested with."""
    version = here.packages[name] or "-"
    tried = here.tried.get(name)
    return version if tried is None else f"{version:<14}tried with {tried}"
