"""The page of the recipe: every key of `veneer train`, from the model that validates it."""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer

from veneer.cli import app
from veneer.data.sources import Source
from veneer.train.recipe import Recipe

PATH = "reference/recipe.md"
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
EXAMPLE = EXAMPLES / "reminders.yaml"
SECTIONS = {
    "model": "Model",
    "method": "Method",
    "data": "Data",
    "epochs": "Training",
    "eval_every": "Evaluation, checkpoints and output",
}
"""The title of each section by its first key."""
HEAD = ("| key | type | default | |", "|---|---|---|---|")


def generated() -> dict[str, str]:
    """The Markdown of the page by its path in docs/."""
    return {PATH: markdown()}


def markdown() -> str:
    example = f"```yaml\n{EXAMPLE.read_text(encoding='utf-8')}```"
    parts = ["# Recipe keys", introduction(), example, *tables(), sources()]
    return "\n\n".join(parts) + "\n"


def tables() -> list[str]:
    """A heading and a table of keys for each section."""
    sections: dict[str, list[str]] = {}
    title = ""
    for name, field in Recipe.model_fields.items():
        title = SECTIONS.get(name, title)
        sections.setdefault(title, []).append(row(name, field))
    return ["\n".join([f"## {title}", "", *HEAD, *rows]) for title, rows in sections.items()]


def introduction() -> str:
    names = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
    listed = ", ".join(f"`{name}`" for name in names)
    without_flag = ", ".join(f"`{name}`" for name in Recipe.model_fields if name not in train_flags())
    return (
        "A recipe is a YAML file for `veneer train`. A flag of the command overrides the key of its name: "
        "`--batch-size` is `batch_size`, and `--option NAME=VALUE` adds to `options`. Every run saves its whole "
        "recipe, with the defaults filled in, as `recipe.yaml` beside the adapter. An unknown key is an error that "
        "names the nearest known one.\n\n"
        f"These keys have no flag of their own and are given as `--set KEY=VALUE`: {without_flag}.\n\n"
        f"Recipes in `examples/`: {listed}. The one of `make demo`:"
    )


def sources() -> str:
    """The keys of an entry of `data`."""
    rows = [row(name, field) for name, field in Source.model_fields.items()]
    text = "An entry of `data` or `eval_data` is a path, or a mapping with these keys:"
    return "\n".join(["## Sources of data", "", text, "", *HEAD, *rows])


def train_flags() -> set[str]:
    """The keys that have a flag of `veneer train`."""
    command = typer.main.get_command(app).commands["train"]
    names = {parameter.name for parameter in command.params}
    return names | {"options"}  # given as --option NAME=VALUE


def row(name: str, field: Any) -> str:
    default = "required" if field.is_required() else f"`{field.default!r}`"
    cells = [f"`{name}`", f"`{kind(field.annotation)}`", default, _cell(field.description or "")]
    return f"| {' | '.join(cells)} |"


def kind(annotation: Any) -> str:
    """A type as a reader of YAML writes it."""
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(str(value) for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " or ".join(kind(part) for part in get_args(annotation) if part is not NoneType)
    if origin in (list, dict):
        return f"{origin.__name__}[{', '.join(kind(part) for part in get_args(annotation))}]"
    return getattr(annotation, "__name__", str(annotation))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
