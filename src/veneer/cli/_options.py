"""Options, and parsers of their values, that several verbs share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.train.recipe import Recipe

ABSENT = "-"
"""In the recipe of a command that does not train, what is not given."""

Column = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OURS=THEIRS",
        help="Read one of veneer's columns from a column with another name, such as prompt=title. Repeatable.",
        rich_help_panel="Data",
    ),
]
Objective = Annotated[
    str | None,
    typer.Option(
        help="What is learned. sft: to write the answers of the data; dpo, orpo or simpo: to prefer the chosen answer "
        "of a pair to the rejected one.",
        show_default="sft",
        rich_help_panel="Model and method",
    ),
]
StartFrom = Annotated[
    str | None,
    typer.Option(
        metavar="ADAPTER",
        help="Train this saved adapter on, with new data or another schedule. With a --method other than its own: "
        "merge it into the base model, and train a new adapter.",
        show_default="a new adapter",
        rich_help_panel="Model and method",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="The base model: a directory, a GGUF file, a name that `veneer pull` knows, or a hub id.",
        show_default="the model that the adapter names",
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
Option = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="FIELD=VALUE",
        help="Another setting of the method, such as lora_alpha=32; `veneer methods NAME` lists them. Repeatable.",
        rich_help_panel="Model and method",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any other key of the recipe, such as warmup=0.1, or setting of the objective or the method. Repeatable.",
        rich_help_panel="Run",
    ),
]
Quantise = Annotated[
    str | None,
    typer.Option(
        help="Quantise the base model: nf4, int8 or int4. none leaves it as it is.",
        show_default="as it was for training the adapters",
    ),
]
AllowAbsent = Annotated[
    bool,
    typer.Option(
        "--allow-absent",
        help="Pass over parts of the adapter for modules that the base model lacks, and list them.",
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
            raise ConfigError(f"{text!r} must be NAME=VALUE")
        result.append((name.strip().replace("-", "_"), value.strip()))
    return result


def add_settings(content: dict[str, Any], set_: list[str] | None, option: list[str] | None) -> None:
    """Add the values of --set and --option to a recipe's content.

    --option gives settings of the method. --set gives a key of the recipe; a name that is no key, but a setting of the
    objective or the method, is taken as that.
    """
    from veneer.train.recipe import Recipe, is_method_setting, is_objective_setting

    settings = {name: dict(content.get(name) or {}) for name in ("options", "objective_options")}
    for name, text in pairs(set_ or []):
        if name in Recipe.model_fields:
            content[name] = value(text)
        elif is_objective_setting(content.get("objective", "sft"), name):
            settings["objective_options"][name] = value(text)
        elif is_method_setting(content.get("method", "lora"), name):
            settings["options"][name] = value(text)
        else:
            content[name] = value(text)
    for name, text in pairs(option or []):
        settings["options"][name] = value(text)
    content |= {name: given for name, given in settings.items() if given}


def value(text: str) -> Any:
    """Parse a text as YAML (a number, true, null, a [list]); text that is not YAML stays as it is."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def partial_recipe(content: dict[str, Any]) -> Recipe:
    """The recipe for a command that does not train; what it lacks, the command does not read.

    A value that is the recipe's own default counts as not given: the adapter that a run starts from may have another.
    """
    from veneer.train.recipe import Recipe, make

    absent = {"output": ABSENT, "data": ABSENT}
    if not content.get("start_from"):
        absent["model"] = ABSENT
    fields = Recipe.model_fields
    given = {name: value for name, value in content.items() if name not in fields or value != fields[name].default}
    if not given.get("data"):
        given.pop("data", None)
    return make(absent | given)
