"""The recipe: all settings of a training run, from a YAML file, from flags, or from both.

The resolved recipe, with every default filled in, is saved next to the adapter. Running it repeats the run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from ..data.sources import Source, Strict
from ..errors import ConfigError, listing, nearest
from ..files.find import find_file
from ..files.locate import ADAPTER as ADAPTER_CONFIG
from ..files.read import read_json
from ..files.recipe import OTHER_KEYS, RECIPE_NAME
from ..files.write import write_atomically

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
PLAIN_NAME = re.compile(r"[\w.]+(\s*,\s*[\w.]+)*")


LIMITS = {
    "greater_than": "more than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}
"""pydantic's errors of numbers out of range, in words."""
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "dict": "a mapping of names to values",
    "model": "a path, or a mapping with a path",
}
"""The beginnings of pydantic's errors of types, and the types in words."""


class Recipe(Strict):
    """One training run."""

    model: str
    """The base model: a directory, a GGUF file, a name that `veneer pull` knows, or a hub id."""
    revision: str | None = None
    """Revision of the base model on the hub."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the base model; auto: bfloat16 where the accelerator computes in it, else float32."""
    quantise: Literal["nf4", "int8", "int4"] | None = None
    """Quantise the base model while it is loaded: nf4 or int8 with bitsandbytes, int4 with HQQ. None, or "none": it
    stays as it is. Not given: the same, or as it was for the adapter that is trained on."""
    quantise_options: dict[str, Any] = {}
    """Options of the library that quantises, under its own names."""

    start_from: str | None = None
    """A saved adapter, a directory or a hub id, that the run starts from. It stays as it is."""
    start_mode: Literal["continue", "merge"] | None = None
    """continue: train that adapter on. merge: merge it into the base model and train a new adapter. None: merge if a
    method other than the adapter's is given, else continue."""

    method: str = "lora"
    """The method; `veneer methods` lists all of them."""
    rank: int | None = Field(None, ge=1)
    """The rank of the update, whatever the method calls it; None: the method's default."""
    targets: str | list[str] | None = None
    """Modules to adapt: "all-linear", name endings, or a regular expression for paths; None: the method's default."""
    options: dict[str, Any] = {}
    """Further fields of the method's config."""

    objective: Literal["sft", "dpo", "orpo", "simpo"] = "sft"
    """What is learned. sft: to write the answers of the data; dpo, orpo, simpo: to prefer the chosen answer of a pair
    to the rejected one."""
    objective_options: dict[str, Any] = {}
    """Settings of the objective, such as DPO's beta."""

    data: list[Source]
    """Data to train on."""
    eval_data: list[Source] = []
    """Data to evaluate on."""
    eval_split: float | None = Field(None, gt=0)
    """Rows held out from the training data for evaluation: a share below 1, or a number of rows."""
    task: Literal["auto", "text", "classification"] = "auto"
    """The task to train for; auto: classification if the data has a label column, else text."""
    labels: list[str] | None = None
    """Names of the classes, in order; None: those found in the data."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that the loss is computed on: the assistant's answers with their end tokens, or all tokens."""
    chat_template: str | None = None
    """A file with a chat template that replaces the tokenizer's."""
    max_length: int = Field(1024, ge=2)
    """Maximum length of a sequence in tokens."""
    long_rows: Literal["cut", "drop"] = "cut"
    """What happens to rows longer than max_length."""
    packing: bool = False
    """Put several rows into one sequence of up to max_length tokens; rows do not attend to each other."""
    streaming: bool = False
    """Read the data while training, for data larger than memory. Needs max_steps."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the data."""
    max_steps: int | None = Field(None, ge=1)
    """Number of optimizer steps; overrides epochs."""
    batch_size: int = Field(8, ge=1)
    """Sequences per forward pass, on each process; pairs, with an objective on pairs."""
    accumulate: int = Field(1, ge=1)
    """Forward passes per optimizer step."""
    eval_batch_size: int | None = Field(None, ge=1)
    """Sequences per forward pass in evaluation; None: batch_size."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; None: the one recommended for the method."""
    schedule: Literal[
        "linear",
        "cosine",
        "constant",
        "polynomial",
        "inverse_sqrt",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "warmup_stable_decay",
        "reduce_lr_on_plateau",
    ] = "cosine"
    """How the learning rate changes after the warm-up; reduce_lr_on_plateau has none, and follows the evaluations."""
    schedule_options: dict[str, Any] = {}
    """Arguments of the schedule, such as min_lr_rate for cosine_with_min_lr; named as in transformers."""
    warmup: float = Field(0.03, ge=0)
    """Length of the warm-up: a share of all steps if below 1, else a number of steps."""
    optimizer: str = "adamw_torch"
    """lora_fa or riemannian, a name of transformers' TrainingArguments, or a class of torch or bitsandbytes in lower
    case, such as nadam or adamw8bit."""
    optimizer_options: dict[str, Any] = {}
    """Arguments of the optimizer, such as betas or momentum."""
    lora_plus_ratio: float | None = Field(None, gt=0)
    """LoRA+: B learns at this multiple of the learning rate; 16 is usual. None: no LoRA+."""
    layer_decay: float | None = Field(None, gt=0)
    """The learning rate of a layer, divided by that of the layer above it. None: all layers learn at the same rate."""
    rates: dict[str, float] = {}
    """Factors of the learning rate, by regular expressions for names of parameters, such as {mlp: 0.5}."""
    neftune_alpha: float | None = Field(None, gt=0)
    """NEFTune: noise on the embeddings in training; 5 is usual. Rows are then padded. None: no noise."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0: no clipping."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    fast: bool = True
    """Use the fast implementations of operations; results differ only by rounding."""
    seed: int = 0

    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations; None: once an epoch."""
    save_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; None: at each evaluation; without evaluation, 100 or one epoch if shorter."""
    keep: int = Field(2, ge=2)
    """Number of checkpoints to keep. At least two, so that one is complete even if the run is killed while saving."""
    best: bool = True
    """With evaluation: keep the checkpoint with the lowest evaluation loss as the result, not the last one."""
    early_stopping: int | None = Field(None, ge=1)
    """Stop after this many evaluations in a row without a lower loss."""
    log_every: int = Field(1, ge=1)
    """Steps between logged losses."""
    samples: int = Field(4, ge=0)
    """Number of held-out rows whose answers before and after training are shown in the report."""
    report_to: list[Literal["wandb", "trackio", "mlflow", "swanlab"]] = []
    """Also log to these; logs for TensorBoard are always written."""
    push_to_hub: str | None = None
    """After training, upload the adapter, its card and its report to this repository of the Hugging Face hub."""
    hub_private: bool = True
    """Whether a repository that push_to_hub creates is private."""
    output: str
    """The output directory: adapter, recipe.yaml, report.html, report.json, checkpoints, logs."""

    @field_validator("data", "eval_data", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        """Accept a path, a mapping, or a list of either."""
        items = value if isinstance(value, list) else [value]
        return [{"path": item} if isinstance(item, str) else item for item in items]

    @field_validator("report_to", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Accept one name, or several that are separated by commas."""
        if not isinstance(value, (str, list)):
            return value
        text = value if isinstance(value, str) else ",".join(map(str, value))
        return [name.strip() for name in text.split(",") if name.strip()]

    @field_validator("push_to_hub")
    @classmethod
    def _repository(cls, value: str | None) -> str | None:
        if value is not None and not REPOSITORY.fullmatch(value):
            raise ValueError("must be owner/name")
        return value

    @field_validator("quantise", mode="before")
    @classmethod
    def _scheme(cls, value: Any) -> Any:
        if value == "none":
            return None
        if value == "gguf":
            raise ValueError(
                "a GGUF file is given as the model, and its weights are dequantised when it is read; leave quantise "
                "out, or quantise them again with nf4, int8 or int4"
            )
        return value

    @field_validator("targets")
    @classmethod
    def _name_endings(cls, value: Any) -> Any:
        return target_names(value)

    @model_validator(mode="before")
    @classmethod
    def _model_of_start(cls, content: Any) -> Any:
        """Take the base model from the adapter that the run starts from, if none is given."""
        if not isinstance(content, dict) or content.get("model") or not content.get("start_from"):
            return content
        config = read_json(find_file(str(content["start_from"]), ADAPTER_CONFIG))
        model = config.get("base_model_name_or_path")
        return content | {"model": model} if model else content

    @model_validator(mode="after")
    def _no_contradictions(self) -> Recipe:
        evaluates = bool(self.eval_data) or self.eval_split is not None
        if self.start_mode is not None and self.start_from is None:
            raise ValueError("start_mode has no effect without start_from; give both or neither")
        if self.quantise_options and self.quantise is None:
            raise ValueError("quantise_options has no effect without quantise; give both or neither")
        if not self.data:
            raise ValueError("data is empty; give at least one source")
        if self.eval_data and self.eval_split is not None:
            raise ValueError("eval_data and eval_split both say what to evaluate on; give only one of them")
        if self.streaming and self.max_steps is None:
            raise ValueError("the length of streaming data is unknown; set max_steps")
        if self.streaming and self.eval_split is not None:
            raise ValueError("streaming data cannot be split; give eval_data")
        if self.packing and self.neftune_alpha is not None:
            raise ValueError("neftune_alpha scales the noise by the length of a row; set packing off")
        if self.schedule == "reduce_lr_on_plateau" and not evaluates:
            raise ValueError("reduce_lr_on_plateau follows the evaluation loss; give eval_data or eval_split")
        if self.early_stopping is not None and not (evaluates and self.best):
            raise ValueError("early_stopping compares evaluations; give eval_data or eval_split, and keep best: true")
        return self

    @model_validator(mode="after")
    def _settings_of_the_objective(self) -> Recipe:
        if self.objective == "sft":
            if self.objective_options:
                raise ValueError(f"objective sft has no settings; leave out {', '.join(self.objective_options)}")
            return self
        if self.task == "classification":
            raise ValueError(f"a classifier writes no answers; objective {self.objective} is for task text")
        if self.loss_on == "all":
            raise ValueError(f"objective {self.objective} compares answers; leave out loss_on: all")
        self.objective_options = self.preference().model_dump()
        return self

    @property
    def reads_pairs(self) -> bool:
        """Whether each row has a chosen and a rejected answer."""
        return self.objective != "sft"

    def preference(self) -> Any:
        """The objective over pairs, with its settings (`veneer.train.objectives`).

        Raises:
            ValueError: a setting is unknown, or has a wrong value.
        """
        from .objectives import ALL

        kind = ALL[self.objective]
        unknown = [name for name in self.objective_options if name not in kind.model_fields]
        if unknown:
            near = nearest(unknown[0], kind.model_fields)
            known = ", ".join(kind.model_fields)
            raise ValueError(f"objective {self.objective} has no setting {unknown[0]!r}{near}; it has {known}")
        try:
            return kind.model_validate(self.objective_options)
        except ValidationError as error:
            (problem, *_) = error.errors()
            name = problem["loc"][0]
            raise ValueError(f"{name} = {problem['input']!r} must be {_wanted(problem)}") from None

    def save(self, directory: Path) -> None:
        """Write `recipe.yaml` into a directory."""
        text = yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
        write_atomically(directory / RECIPE_NAME, text.encode())

    def changed(self, **values: Any) -> Recipe:
        """A copy of the recipe with other values, validated."""
        return make(self.model_dump() | values)


def target_names(value: Any) -> Any:
    """Turn "q_proj,v_proj" into a list of name endings; any other string is "all-linear" or a regular expression."""
    if isinstance(value, str) and value.lower().replace("_", "-") == "all-linear":
        return "all-linear"
    if isinstance(value, str) and value != "all-linear" and PLAIN_NAME.fullmatch(value):
        return [name.strip() for name in value.split(",")]
    return value


def make(content: Mapping[str, Any]) -> Recipe:
    """Validate a recipe given as a mapping.

    Raises:
        ConfigError: a key is unknown (the message names the nearest known one), missing, or has a wrong value.
    """
    try:
        return Recipe.model_validate(dict(content))
    except ValidationError as error:
        messages = [_message(problem, content) for problem in error.errors()]
        if len(messages) == 1:
            raise ConfigError(messages[0]) from None
        raise ConfigError(f"the recipe has {len(messages)} errors:{listing(messages)}") from None


def is_objective_setting(objective: Any, name: str) -> bool:
    """Whether an objective has a setting of this name; false for objective sft and unknown ones."""
    if objective == "sft":
        return False
    from .objectives import ALL

    return objective in ALL and name in ALL[objective].model_fields


def is_method_setting(method: Any, name: str) -> bool:
    """Whether a method has a setting of this name; false if there is no such method."""
    from ..model.catalogue import page

    try:
        return name in {field.name for field in page(str(method)).fields}
    except ConfigError:
        return False


def _message(error: Any, content: Mapping[str, Any]) -> str:
    """The message for one of pydantic's errors."""
    path = [str(part) for part in error["loc"]]
    key = ".".join(part for part in path if part not in ("str", "list[str]"))
    is_nested = len(path) > 1
    if error["type"] == "extra_forbidden":
        known_keys = Source.model_fields if is_nested else Recipe.model_fields
        method = content.get("method", "lora")
        if not is_nested and key in OTHER_KEYS:
            return f"a recipe has no key {key!r}; here it is {OTHER_KEYS[key]}"
        objective = content.get("objective", "sft")
        if not is_nested and is_objective_setting(objective, key):
            return f"a recipe has no key {key!r}: it is a setting of {objective} and belongs under objective_options"
        if not is_nested and is_method_setting(method, key):
            return f"a recipe has no key {key!r}: it is a setting of {method} and belongs under options"
        return f"a recipe has no key {key!r}{nearest(path[-1], known_keys)}"
    if error["type"] == "missing":
        flag = "" if is_nested else f" (--{key.replace('_', '-')})"
        return f"the recipe lacks {key!r}{flag}"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return f"{key} = {error['input']!r}: {message}" if key else message
    return f"{key} = {error['input']!r} must be {_wanted(error)}"


def _wanted(error: Any) -> str:
    """What one of pydantic's errors asks for, in words."""
    kind = error["type"]
    limits = error.get("ctx", {})
    for name, words in LIMITS.items():
        if kind == name:
            (limit,) = limits.values()
            return f"{words} {limit:g}"
    if kind == "literal_error":
        return limits["expected"].replace("'", "")
    for ending, words in KINDS.items():
        if kind.startswith(ending):
            return words
    message: str = error["msg"]
    return message.removeprefix("Input should be ").removeprefix("a valid ")
