"""The page of the command line: every verb with its options, from the typer app that runs them."""

from __future__ import annotations

import re
from typing import Any

import typer

from veneer.cli import app

PATH = "reference/command-line.md"
COMMENT = re.compile(r"^(?P<command>\S.*?)(?: {2,}(?P<comment>.*))?$", re.DOTALL)
DEFAULT = re.compile(r"\s*\[(default: [^\]]*|required)\]$")


def generated() -> dict[str, str]:
    """The Markdown of the page by its path in docs/."""
    return {PATH: markdown()}


def markdown() -> str:
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="veneer")
    parts = ["# Command line", introduction(), summary(group)]
    for name, command in group.commands.items():
        parts.append(verb(command, typer.Context(command, info_name=name, parent=context)))
    return "\n\n".join(parts) + "\n"


def introduction() -> str:
    return (
        "Every verb takes `--help`. An error that you can fix is one line on stderr and exit status 2; "
        "`VENEER_DEBUG=1` shows its traceback. `veneer --version` prints the version. "
        "`python -m veneer` is the same command."
    )


def summary(group: Any) -> str:
    """A table of the verbs with the first line of each."""
    rows = [f"| [`{name}`](#veneer-{name}) | {first_line(command)} |" for name, command in group.commands.items()]
    return "\n".join(["| verb | |", "|---|---|", *rows])


def first_line(command: Any) -> str:
    return _cell(command.help.partition("\n")[0])


def verb(command: Any, context: Any) -> str:
    """One verb: usage, help, and a table of its arguments and options."""
    usage = command.get_usage(context).removeprefix("Usage: ")
    rows = [row(parameter, context) for parameter in command.get_params(context) if parameter.name != "help"]
    table = "\n".join(["| argument or option | | default |", "|---|---|---|", *rows])
    return "\n\n".join([f"## veneer {context.info_name}", f"```text\n{usage}\n```", prose(command.help), table])


def row(parameter: Any, context: Any) -> str:
    name, text = parameter.get_help_record(context)
    found = DEFAULT.search(text)
    default = found[1].removeprefix("default: ") if found else ""
    if default and default != "required":
        default = f"`{default}`"
    return f"| {flags(name)} | {_cell(DEFAULT.sub('', text))} | {_cell(default)} |"


def flags(name: str) -> str:
    """`--name TYPE` of "--name <type>"."""
    return f"`{_cell(name)}`"


def prose(text: str) -> str:
    """The help of a verb as Markdown; its indented examples become code, each comment a line above its command."""
    blocks: list[str] = []
    for paragraph in text.split("\n\n"):
        if not paragraph.startswith("  "):
            blocks.append(" ".join(paragraph.split("\n")))
        elif blocks and blocks[-1].startswith("```sh"):
            blocks[-1] = blocks[-1].removesuffix("\n```") + f"\n{example(paragraph)}\n```"
        else:
            blocks.append(f"```sh\n{example(paragraph)}\n```")
    return "\n\n".join(blocks)


def example(paragraph: str) -> str:
    found = COMMENT.match(paragraph.strip())
    comment = found["comment"]
    if not comment:
        return found["command"]
    return f"# {' '.join(comment.split())}\n{found['command']}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
