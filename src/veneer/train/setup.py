"""The tokenizer, the base model and the adapter that a recipe names."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from ..core.config import Config, PromptConfig, TaskType, all_methods
from ..errors import ConfigError
from ..model import loading, stages
from ..model.catalogue import page
from ..model.peft_model import PeftModel, get_peft_model
from ..upstream.quantisation import quantisation
from .recipe import Recipe
from .stage import continued

ASSUMED = ("num_virtual_tokens",)
"""Required settings without a default; they take the value of the method's example."""


def load_tokenizer(recipe: Recipe) -> Any:
    return loading.load_tokenizer(recipe.model, recipe.revision)


def within_positions(recipe: Recipe) -> Recipe:
    """The recipe with `max_length` no longer than a sequence of the base model may be, learned prompt included."""
    positions = loading.positions_of(recipe.model, recipe.revision)
    if positions is None:
        return recipe
    room = positions - _prompt_length(recipe)
    if room < 2:
        raise ConfigError(f"the prompt of {recipe.method} takes all {positions} positions of {recipe.model!r}")
    return recipe.changed(max_length=min(recipe.max_length, room))


def _prompt_length(recipe: Recipe) -> int:
    """The number of positions that the method's prompt takes."""
    config_class = all_methods()[page(recipe.method).name]
    if not issubclass(config_class, PromptConfig):
        return 0
    settings = {**config_class.example, **config_class.recommended, **recipe.options}
    if is_continued(recipe):
        settings = vars(continued(recipe, {}, 1))
    length = settings.get("num_virtual_tokens") or 0
    return length if isinstance(length, int) else 0


def load_base(recipe: Recipe, labels: list[str] | None, pad: int) -> Any:
    """Load the base model, with a classification head if there are labels, and with earlier adapters merged in.

    Raises:
        ConfigError: the model is an encoder-decoder and the task is text.
        VeneerError: the adapter that the run starts from does not fit it, or cannot be merged.
    """
    task = TaskType.CAUSAL_LM if labels is None else TaskType.SEQ_CLS
    base, _ = loading.load_model(
        recipe.model,
        loading.AUTO_CLASSES[task],
        revision=recipe.revision or "main",
        classes=labels,
        pad=pad,
        dtype=loading.dtype_of(recipe.dtype),
        quantise=quantisation(recipe.quantise, recipe.quantise_options),
    )
    if base.config.is_encoder_decoder and labels is None:
        raise ConfigError(
            f"{recipe.model!r} is an encoder-decoder; `veneer train` supports causal language models and classifiers"
        )
    if recipe.start_from is None:
        return base
    below = stages.with_earlier if is_continued(recipe) else stages.with_adapter
    return below(base, recipe.start_from)


def adapt(model: Any, recipe: Recipe, task: TaskType, steps: int) -> PeftModel:
    """Attach the recipe's adapter to a base model: a new one, or the one that is trained on."""
    config = method_config(recipe, task, steps)
    if not is_continued(recipe):
        return get_peft_model(model, config)
    assert recipe.start_from is not None
    adapted = PeftModel.from_pretrained(model, recipe.start_from, is_trainable=True, config=config, follow_paths=True)
    stages.start_again_(adapted)
    return adapted


def is_continued(recipe: Recipe) -> bool:
    """Whether the run trains a saved adapter on. The recipe is one that `begun` returned."""
    return recipe.start_from is not None and recipe.start_mode == "continue"


def method_config(recipe: Recipe, task: TaskType | None, steps: int) -> Config:
    """The config of the recipe's method.

    Args:
        steps: optimizer steps of the run, for methods with a schedule.

    Raises:
        ConfigError: the method has no such setting.
    """
    method = page(recipe.method).name
    config_class = all_methods()[method]
    if is_continued(recipe):
        given = given_settings(recipe, method, {field.name for field in fields(config_class)})
        return continued(recipe, given, steps)
    return config_class(task_type=task, **method_settings(recipe, steps))


def method_settings(recipe: Recipe, steps: int) -> dict[str, Any]:
    """The fields of the method's config: the recommended settings, overridden by the recipe's own.

    Raises:
        ConfigError: the method has no such setting.
    """
    method = page(recipe.method).name
    config_class = all_methods()[method]
    field_names = {field.name for field in fields(config_class)}

    settings: dict[str, Any] = {}
    for name in ASSUMED:
        if name in config_class.example:
            settings[name] = config_class.example[name]
    settings |= config_class.recommended
    if "total_step" in field_names:
        settings["total_step"] = steps

    return settings | given_settings(recipe, method, field_names)


def given_settings(recipe: Recipe, method: str, field_names: set[str]) -> dict[str, Any]:
    """The fields of the method's config that the recipe sets.

    Raises:
        ConfigError: a field is set twice, or the method has no rank or targets.
    """
    from_keys = _rank(recipe, method, field_names) | _targets(recipe, method, field_names)
    twice = from_keys.keys() & recipe.options.keys()
    if twice:
        raise ConfigError(f"both options and rank or targets set {', '.join(sorted(twice))}; give only one of them")
    return from_keys | recipe.options


def facts_of(recipe: Recipe) -> tuple[str, ...]:
    """Names of the columns that the method reads from each row, such as `task_ids` for Poly."""
    return all_methods()[page(recipe.method).name].facts


def _rank(recipe: Recipe, method: str, field_names: set[str]) -> dict[str, Any]:
    """The recipe's rank as fields of the method's config."""
    if recipe.rank is None:
        return {}
    if {"init_r", "target_r"} <= field_names:  # AdaLoRA starts with 1.5 times the rank and prunes to the target
        return {"target_r": recipe.rank, "init_r": math.ceil(recipe.rank * 3 / 2)}
    if "r" in field_names:
        return {"r": recipe.rank}
    known = [field.name for field in page(method).fields]
    settings = ", ".join(known) or "none"
    raise ConfigError(f"{method} has no rank; leave it out. Settings that can be given under options: {settings}")


def _targets(recipe: Recipe, method: str, field_names: set[str]) -> dict[str, Any]:
    """The recipe's targets as a field of the method's config."""
    if recipe.targets is None:
        return {}
    if "target_modules" not in field_names:
        raise ConfigError(f"{method} learns a prompt and has no target modules; leave targets out")
    return {"target_modules": recipe.targets}
