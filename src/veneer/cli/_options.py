"""Values of options and of output that several verbs share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Column = Annotated[
    list[str] | None, typer.Option(help="OURS=THEIRS, as in prompt=title: a column's other name; repeatable.")
]


def source(text: str) -> dict[str, Any]:
    """A data source from PATH or PATH*WEIGHT. A * that no number follows belongs to the path."""
    path, star, weight = text.rpartition("*")
    if not star:
        return {"path": text}
    try:
        return {"path": path, "weight": float(weight)}
    except ValueError:
        return {"path": text}


def pairs(texts: list[str]) -> list[tuple[str, str]]:
    """(name, value) of each NAME=VALUE."""
    result = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} must be NAME=VALUE")
        result.append((name.strip().replace("-", "_"), value.strip()))
    return result
