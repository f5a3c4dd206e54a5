"""The page of the command line: every verb with its options, from the typer app that runs them."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

import typer

from veneer.cli import app

PATH = "reference/command-line.md"
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
    return _plain(command.help.partition("\n")[0])


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
        default = f"`{default.removeprefix('(').removesuffix(')')}`"
    return f"| {flags(name)} | {_plain(DEFAULT.sub('', text))} | {_cell(default)} |"


def flags(name: str) -> str:
    """The names of an option as code, one below the other: `--packing` and `--no-packing`."""
    return "<br>".join(f"`{_cell(part)}`" for part in name.split(" / "))


def prose(text: str) -> str:
    """The help of a verb as Markdown: paragraphs of indented lines become blocks of code."""
    blocks: list[str] = []
    code: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("  "):
            code.append(dedent(paragraph))
            continue
        blocks += fenced(code)
        code = []
        blocks.append(" ".join(paragraph.split()))
    return "\n\n".join([*blocks, *fenced(code)])


def fenced(paragraphs: list[str]) -> list[str]:
    """A block of code of several paragraphs; nothing if there is none."""
    if not paragraphs:
        return []
    text = "\n\n".join(paragraphs)
    language = "sh" if "veneer " in text else "text"
    return [f"```{language}\n{text}\n```"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _plain(text: str) -> str:
    """Text of a cell whose stars and angle brackets are shown as they are, outside of its code."""
    parts = text.split("`")
    parts[::2] = [part.replace("*", "\\*").replace("<", "&lt;") for part in parts[::2]]
    return _cell("`".join(parts))
