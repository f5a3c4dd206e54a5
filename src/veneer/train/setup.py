"""The tokenizer, the base model and the adapter that a recipe names."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..core.config import Config, TaskType, all_methods
from ..errors import ConfigError
from ..model import loading
from ..model.catalogue import page
from ..model.peft_model import PeftModel, get_peft_model
from .recipe import Recipe

ASSUMED = ("num_virtual_tokens",)
"""Settings that a method cannot do without, for which its example is a fair choice."""


def load_tokenizer(recipe: Recipe) -> Any:
    return loading.load_tokenizer(recipe.model, recipe.revision)


def load_base(recipe: Recipe, labels: list[str] | None, pad: int) -> Any:
    """The base model, with a head for the classes if there are any.

    Raises:
        ConfigError: the model generates no text from text.
    """
    task = TaskType.CAUSAL_LM if labels is None else TaskType.SEQ_CLS
    settings: dict[str, Any] = {"classes": labels, "pad": pad, "dtype": loading.dtype_of(recipe.dtype)}
    revision = recipe.revision or "main"
    base, _ = loading.load_model(recipe.model, loading.AUTO_CLASSES[task], revision=revision, **settings)
    if base.config.is_encoder_decoder and labels is None:
        raise ConfigError(f"{recipe.model!r} is an encoder-decoder; veneer train takes causal language models")
    return base


def adapt(model: Any, recipe: Recipe, task: TaskType, steps: int) -> PeftModel:
    """Put the recipe's adapter on."""
    return get_peft_model(model, method_config(recipe, task, steps))


def method_config(recipe: Recipe, task: TaskType, steps: int) -> Config:
    """The config of the recipe's method: its recommended settings, and those given.

    Args:
        steps: optimizer steps of the run, for methods with a schedule.

    Raises:
        ConfigError: the method has no such setting.
    """
    method = page(recipe.method).name
    kind = all_methods()[method]
    names = {f.name for f in fields(kind)}
    settings = {**{name: kind.example[name] for name in ASSUMED if name in kind.example}, **kind.recommended}
    given = {**_rank(recipe, method, names), **_targets(recipe, method, names)}
    both = given.keys() & recipe.options.keys()
    if both:
        raise ConfigError(f"options set {', '.join(sorted(both))}, and so does rank or targets; give one of them")
    if "total_step" in names:
        settings["total_step"] = steps
    return kind(**{"task_type": task, **settings, **given, **recipe.options})


def facts_of(recipe: Recipe) -> tuple[str, ...]:
    """What the method wants to know of each row."""
    return all_methods()[page(recipe.method).name].facts


def _rank(recipe: Recipe, method: str, names: set[str]) -> dict[str, Any]:
    if recipe.rank is None:
        return {}
    if "r" in names:
        return {"r": recipe.rank}
    if {"init_r", "target_r"} <= names:  # starts with more, and keeps this many on average
        return {"target_r": recipe.rank, "init_r": -(-recipe.rank * 3 // 2)}
    own = ", ".join(f.name for f in page(method).fields) or "none of its own"
    raise ConfigError(f"{method} has no rank; its settings, to be given under options, are {own}")


def _targets(recipe: Recipe, method: str, names: set[str]) -> dict[str, Any]:
    if recipe.targets is None:
        return {}
    if "target_modules" not in names:
        raise ConfigError(f"{method} learns a prompt and has no targets; leave them out")
    return {"target_modules": recipe.targets}
