"""The page of `veneer data --html`: rows token by token, lengths, duplicates and odd rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.summary import remarks, table_rows
from ..train.page import bars, templates
from ..train.recipe import Recipe


def render_data(content: dict[str, Any], recipe: Recipe) -> str:
    """The page as HTML.

    Args:
        content: `veneer.data.look.Look.as_dict()`.
    """
    parts = {"training": content["train"]}
    if content["evaluation"] is not None:
        parts["evaluation"] = content["evaluation"]
    histograms = {}
    for name, part in parts.items():
        histograms[name] = bars(part["histogram"], content["max_length"])
    sources = [Path(source.path).name for source in recipe.data]
    template = templates().get_template("data.html.j2")
    return template.render(
        d=content,
        title=", ".join(sources),
        model=Path(recipe.model).name,
        parts=parts,
        histograms=histograms,
        lines=list(table_rows(list(parts.values()), content["max_length"])),
        remarks=list(remarks(content)),
    )
