"""The recipe: everything that decides a training run, as YAML, as flags, or both.

The resolved recipe, with every default filled in, is saved beside the adapter and runs it again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from ..data.sources import Source, Strict
from ..errors import ConfigError, nearest
from ..files.recipe import RECIPE_NAME
from ..files.write import write_atomically

PLAIN_NAME = re.compile(r"[\w.]+(\s*,\s*[\w.]+)*")


class Recipe(Strict):
    """One training run."""

    model: str
    """The base model: a directory, a name that `veneer pull` knows, or a hub id."""
    revision: str | None = None
    """The revision of the base model on the hub."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the base is held in; auto: bfloat16 where the accelerator computes in it, else float32."""

    method: str = "lora"
    """The method; `veneer methods` lists all."""
    rank: int | None = Field(None, ge=1)
    """The method's rank, whatever it calls it."""
    targets: str | list[str] | None = None
    """Modules to adapt: "all-linear", name endings, or a regular expression for whole paths. None: the method's own."""
    options: dict[str, Any] = {}
    """Further settings of the method's config, under its own names."""

    data: list[Source]
    """What to train on."""
    eval_data: list[Source] = []
    """What to evaluate on."""
    eval_split: float | None = Field(None, gt=0)
    """Rows taken from the data for evaluation instead: a share below 1, or a number of rows."""
    task: Literal["auto", "text", "classification"] = "auto"
    """What to learn; auto: classification when the data has a label, else text."""
    labels: list[str] | None = None
    """Names of the classes in order; None: those in the data."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Which tokens are learned: the assistant's answers and their ends, or all."""
    chat_template: str | None = None
    """A file with a chat template in place of the tokenizer's."""
    max_length: int = Field(1024, ge=2)
    """Longest sequence in tokens."""
    long_rows: Literal["cut", "drop"] = "cut"
    """What happens to rows that are longer."""
    packing: bool = False
    """Put several rows into one sequence of up to max_length tokens; none sees another."""
    streaming: bool = False
    """Read the data as it is used: for data larger than memory. Needs max_steps."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the data."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps, instead of epochs."""
    batch_size: int = Field(8, ge=1)
    """Sequences of one forward pass, on each process."""
    accumulate: int = Field(1, ge=1)
    """Forward passes of one optimizer step."""
    eval_batch_size: int | None = Field(None, ge=1)
    """Sequences of one forward pass in evaluation; None: batch_size."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; None: the method's own."""
    schedule: Literal["linear", "cosine", "constant", "polynomial", "inverse_sqrt"] = "cosine"
    """What the learning rate does after the warm-up."""
    warmup: float = Field(0.03, ge=0)
    """Warm-up: a share of all steps below 1, or a number of steps."""
    optimizer: str = "adamw_torch"
    """An optimizer of transformers' TrainingArguments."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0: not at all."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    fast: bool = True
    """Take the fast paths, which change no result beyond rounding."""
    seed: int = 0

    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations; None: once an epoch."""
    save_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; None: with each evaluation, and otherwise every 100 steps or once an epoch."""
    keep: int = Field(2, ge=2)
    """Checkpoints to keep; two, so that one is whole whenever the run is killed."""
    best: bool = True
    """Of the checkpoints, the adapter with the lowest evaluation loss is the result (where there is an evaluation)."""
    early_stopping: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a lower loss."""
    log_every: int = Field(1, ge=1)
    """Steps between logged losses."""
    samples: int = Field(4, ge=0)
    """Held-out rows to which the report shows the model's answers, before and after."""
    wandb: bool = False
    """Also log to Weights & Biases."""
    output: str
    """The directory of the result: the adapter, recipe.yaml, report.html, report.json, checkpoints, logs."""

    @field_validator("data", "eval_data", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        """A path, a mapping, or a list of either."""
        items = value if isinstance(value, list) else [value]
        return [{"path": item} if isinstance(item, str) else item for item in items]

    @field_validator("targets")
    @classmethod
    def _name_endings(cls, value: Any) -> Any:
        """A plain name, or several with commas, are name endings; any other string is a regular expression."""
        if isinstance(value, str) and value != "all-linear" and PLAIN_NAME.fullmatch(value):
            return [name.strip() for name in value.split(",")]
        return value

    @model_validator(mode="after")
    def _no_contradictions(self) -> Recipe:
        evaluates = bool(self.eval_data) or self.eval_split is not None
        if not self.data:
            raise ValueError("data is empty; give at least one file")
        if self.eval_data and self.eval_split is not None:
            raise ValueError("eval_data and eval_split both say what to evaluate on; give one of them")
        if self.streaming and self.max_steps is None:
            raise ValueError("streaming data has no known end; give max_steps")
        if self.streaming and self.eval_split is not None:
            raise ValueError("streaming data cannot be split; give eval_data")
        if self.early_stopping is not None and not (evaluates and self.best):
            raise ValueError("early_stopping compares evaluations; give eval_data or eval_split, and leave best on")
        return self

    def save(self, directory: Path) -> None:
        """Write `recipe.yaml` into a directory."""
        text = yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
        write_atomically(directory / RECIPE_NAME, text.encode())

    def changed(self, **values: Any) -> Recipe:
        """The same recipe with other values, checked."""
        return make(self.model_dump() | values)


def make(content: Mapping[str, Any]) -> Recipe:
    """A recipe from its keys.

    Raises:
        ConfigError: a key is unknown (the nearest right one is named), missing, or has a wrong value.
    """
    try:
        return Recipe.model_validate(dict(content))
    except ValidationError as error:
        raise ConfigError("; ".join(_spell(e) for e in error.errors()[:3])) from None


def _spell(error: Any) -> str:
    """One of pydantic's errors in our words."""
    place = [str(part) for part in error["loc"]]
    where = ".".join(part for part in place if part not in ("str", "list[str]"))
    if error["type"] == "extra_forbidden":
        known = (Source if len(place) > 1 else Recipe).model_fields
        return f"a recipe has no key {where!r}{nearest(place[-1], known)}"
    if error["type"] == "missing":
        flag = " (--" + where.replace("_", "-") + ")" if len(place) == 1 else ""
        return f"the recipe lacks {where!r}{flag}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where} = {error['input']!r}: {message}" if where else message
