"""Values of options and of output that several verbs share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Column = Annotated[
    list[str] | None, typer.Option(help="OURS=THEIRS, as in prompt=title: a column's other name; repeatable.")
]


def source(text: str) -> dict[str, Any]:
    """PATH or PATH*WEIGHT."""
    path, star, weight = text.rpartition("*")
    try:
        return {"path": path, "weight": float(weight)} if star else {"path": text}
    except ValueError:
        return {"path": text}


def pairs(texts: list[str]) -> list[tuple[str, str]]:
    """(name, value) of each NAME=VALUE."""
    found = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} must be NAME=VALUE")
        found.append((name.strip().replace("-", "_"), value.strip()))
    return found
