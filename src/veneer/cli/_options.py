"""Options, and parsers of their values, that several verbs share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Column = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OURS=THEIRS",
        help="Read one of veneer's columns from a column with another name, such as prompt=title. Repeatable.",
        rich_help_panel="Data",
    ),
]

Rank = Annotated[
    int | None,
    typer.Option(help="Rank of the update.", show_default="set by the method", rich_help_panel="Model and method"),
]
Targets = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Modules to adapt: all-linear, endings of module names separated by commas, such as q_proj,v_proj, or a "
        "regular expression for whole paths.",
        show_default="set by the method",
        rich_help_panel="Model and method",
    ),
]


def source(text: str) -> dict[str, Any]:
    """Parse PATH or PATH*WEIGHT as a data source. A `*` without a number after it is part of the path."""
    path, star, weight = text.rpartition("*")
    if not star:
        return {"path": text}
    try:
        return {"path": path, "weight": float(weight)}
    except ValueError:
        return {"path": text}


def pairs(texts: list[str]) -> list[tuple[str, str]]:
    """Split each NAME=VALUE into (name, value); hyphens in names become underscores."""
    result = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} must be NAME=VALUE")
        result.append((name.strip().replace("-", "_"), value.strip()))
    return result
