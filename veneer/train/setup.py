"""The tokenizer, the base model and the adapter that a recipe names."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from ..catalogue import page
from ..core.config import Config, TaskType, all_methods
from ..core.model import PeftModel, get_peft_model
from ..errors import ConfigError
from ..hub import resolve
from .recipe import Recipe

ASSUMED = ("num_virtual_tokens",)
"""Settings that a method cannot do without, for which its example is a fair choice."""


def load_tokenizer(recipe: Recipe) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve(recipe.model), revision=recipe.revision or "main")


def load_base(recipe: Recipe, labels: list[str] | None, pad: int) -> Any:
    """The base model, with a head for the classes if there are any.

    Raises:
        ConfigError: the model generates no text from text.
    """
    import transformers

    name, revision = resolve(recipe.model), recipe.revision or "main"
    config = transformers.AutoConfig.from_pretrained(name, revision=revision)
    if config.is_encoder_decoder and labels is None:
        raise ConfigError(f"{recipe.model!r} is an encoder-decoder; veneer train takes causal language models")
    if labels is not None:
        config.num_labels, config.id2label = len(labels), dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = pad
    auto = transformers.AutoModelForCausalLM if labels is None else transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(name, revision=revision, config=config, dtype=dtype_of(recipe))


def dtype_of(recipe: Recipe) -> torch.dtype:
    """What the base is held in; the adapter of a half-precision base is held in fp32 all the same."""
    if recipe.dtype != "auto":
        return getattr(torch, recipe.dtype)
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


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
