"""Base models, and adapters on one base: what every verb that runs a model begins with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.config import Config, TaskType
from ..errors import CheckpointError, ConfigError, first_line, nearest
from ..files.find import find_weights
from ..files.pull import resolve
from ..upstream.auto import AUTO_CLASSES, makes
from .peft_model import PeftModel

BASE = "base"
"""What the base model is called beside the adapters."""
HEADS = ("score", "classifier")
"""What transformers calls the head of a classifier."""


@dataclass
class Loaded:
    """A base model with any number of adapters on it, one of which runs at a time."""

    model: Any
    """A PeftModel; the bare model where there is no adapter."""
    tokenizer: Any
    base: str
    """Where the base model came from."""
    adapters: tuple[str, ...]
    task: TaskType
    labels: list[str] | None
    """The classes in order, for a classifier whose classes have names."""
    base_is_whole: bool
    """False where the base has no head of its own for the task, so that only its adapters can be judged."""

    @property
    def names(self) -> tuple[str, ...]:
        """All that can be run: the base, then the adapters."""
        return (BASE, *self.adapters)

    @property
    def facts(self) -> set[str]:
        """Columns of the data that the adapters' methods want to know of each row."""
        return self.model._state.fact_names() - {"adapter_names"} if self.adapters else set()

    def known(self, name: str) -> str:
        """The name, if there is one such.

        Raises:
            ConfigError: there is none; names the nearest.
        """
        if name not in self.names:
            there = f"there is {', '.join(self.names)}{nearest(name, self.names)}"
            raise ConfigError(f"nothing is called {name!r}; {there}")
        return name

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Inside, the model computes what one adapter makes of it, or what the base does."""
        if self.known(name) != BASE:
            self.model.set_adapter(name)
            yield
        elif self.adapters:
            with self.model.disable_adapter():
                yield
        else:
            yield


def load(
    adapters: Sequence[str] = (),
    model: str | None = None,
    *,
    task: TaskType = TaskType.CAUSAL_LM,
    labels: list[str] | None = None,
    dtype: str = "auto",
) -> Loaded:
    """Load a base model and put adapters on it.

    Args:
        adapters: directories or hub ids, or NAME=PLACE; an adapter without a name is called as its directory.
        model: the base model; None: the one that the adapters name.
        task: what the base is loaded for where there is no adapter to say so.
        labels: the classes in order; None: those that the training recipe beside an adapter names.
        dtype: of the base, as in a recipe.

    Raises:
        VeneerError: nothing names a base, the adapters differ in it or in their task, or a file is damaged.
    """
    places = named(adapters)
    configs = {name: Config.from_pretrained(place) for name, place in places.items()}
    base, task = _one_base(configs, model), _one_task(configs, task)
    tokenizer = load_tokenizer(base)
    counts = {name: count_classes(place) for name, place in places.items()} if task is TaskType.SEQ_CLS else {}
    settings: dict[str, Any] = {"pad": pad_of(tokenizer), "dtype": dtype_of(dtype)}
    bare, missing = load_model(base, AUTO_CLASSES[task], classes=_one_count(counts), **settings)
    if bare.config.is_encoder_decoder:
        raise ConfigError(f"{base!r} is an encoder-decoder; this takes causal language models and classifiers")
    names = _labels(places, bare.config, labels) if task is TaskType.SEQ_CLS else None
    return Loaded(_adapted(bare, places), tokenizer, base, tuple(places), task, names, not missing)


def named(adapters: Sequence[str]) -> dict[str, str]:
    """Places of adapters by name.

    Raises:
        ConfigError: two have one name.
    """
    found: dict[str, str] = {}
    for text in adapters:
        name, equals, place = text.partition("=")
        if not equals or Path(text).exists():
            name, place = Path(text).resolve().name, text
        if name in found or name == BASE:
            other = "the base model" if name == BASE else f"{found[name]!r}"
            raise ConfigError(f"{place!r} would be called {name!r}, as is {other}; give it another name, NAME={place}")
        found[name] = place
    return found


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The tokenizer of a base model.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve(model), revision=revision or "main")
    except OSError as error:
        raise ConfigError(f"the tokenizer of {model!r} cannot be loaded: {first_line(error)}") from None


def pad_of(tokenizer: Any) -> int:
    """The token to fill batches with."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


def dtype_of(name: str) -> Any:
    """What a base is held in; auto: bfloat16 where the accelerator computes in it, else float32."""
    import torch

    if name not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype {name!r} must be auto, float32 or bfloat16{nearest(name, ('float32', 'bfloat16'))}")
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def load_model(
    model: str, auto_class: str, *, classes: int | list[str] | None = None, pad: int | None = None, **kwargs: Any
) -> tuple[Any, set[str]]:
    """A base model, and the names of its parameters that the file does not hold.

    Args:
        model: a directory, a name that `veneer pull` knows, or a hub id.
        auto_class: which of transformers' classes.
        classes: how many classes there are, or their names, for a classifier.
        pad: the padding token where the config has none.
        kwargs: `dtype`, `revision` and others of `from_pretrained`.

    Raises:
        ConfigError: there is no such model.
    """
    import transformers

    hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
    try:
        config = transformers.AutoConfig.from_pretrained(resolve(model), **hub)
        if classes is not None or pad is not None:
            kwargs = {**kwargs, "config": _described(config, classes, pad)}
        auto = makes(auto_class, config)
        if auto is None:
            raise ConfigError(f"{model!r} is a {config.model_type}, of which transformers has no {auto_class}")
        found, about = auto.from_pretrained(resolve(model), output_loading_info=True, **kwargs)
    except OSError as error:
        reason = first_line(error)
        raise ConfigError(f"the base model {model!r} cannot be loaded; say where it is with model: {reason}") from None
    return found, set(about["missing_keys"])


def load_base(
    adapter: str | Path,
    model: str | None = None,
    *,
    config: Config | None = None,
    auto_class: str | None = None,
    task: TaskType | None = None,
    hub: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """The base model of an adapter, without it; on request from another place than the one its config names.

    Args:
        auto_class: which of transformers' classes; None: that of the adapter's task.
        task: what an adapter is for that does not say so.
        hub: how to download the adapter.
        kwargs: for the base model's `from_pretrained`.

    Raises:
        ConfigError: neither names a base model, or the adapter does not say what it is for.
    """
    hub = hub or {}
    config = config or Config.from_pretrained(adapter, **hub)
    name = model or config.base_model_name_or_path
    if not name:
        raise ConfigError(f"{str(adapter)!r} does not name its base model; say which with model, or load it yourself")
    if auto_class is None:
        task = config.task_type if isinstance(config.task_type, TaskType) else task
        if task is None:
            raise ConfigError(f"{str(adapter)!r} states no task_type; use the AutoPeftModelFor... class of its task")
        auto_class = AUTO_CLASSES[task]
    classes = count_classes(adapter, **hub) if auto_class == AUTO_CLASSES[TaskType.SEQ_CLS] else None
    kwargs = {**({} if classes is None else {"num_labels": classes}), **kwargs}
    shared = {key: hub[key] for key in ("token", "cache_dir", "local_files_only") if key in hub}
    return load_model(name, auto_class, revision="main" if model else config.revision or "main", **shared, **kwargs)[0]


def count_classes(adapter: str | Path, **hub: Any) -> int | None:
    """Classes of the classifier that an adapter's file holds; None: it holds none."""
    from safetensors import SafetensorError, safe_open

    path = find_weights(adapter, **hub)
    try:
        with safe_open(path, framework="pt") as file:
            heads = [k for k in file.keys() if k.endswith(".weight") and set(HEADS) & set(k.split("."))]  # noqa: SIM118
            return min((file.get_slice(key).get_shape()[0] for key in heads), default=None)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}") from None


def _described(config: Any, classes: int | list[str] | None, pad: int | None) -> Any:
    """A base model's config that knows what is asked of the model."""
    if isinstance(classes, int):
        config.num_labels = classes
    elif classes is not None:
        config.num_labels, config.id2label = len(classes), dict(enumerate(classes))
        config.label2id = {label: number for number, label in enumerate(classes)}
    if pad is not None and config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = pad
    return config


def _one_base(configs: dict[str, Config], model: str | None) -> str:
    if model is not None:
        return model
    bases = {name: config.base_model_name_or_path for name, config in configs.items()}
    found = {resolve(base) for base in bases.values() if base}
    if not found:
        which = f"{', '.join(map(repr, configs))} names no base model" if configs else "there is no adapter to name one"
        raise ConfigError(f"which base model? {which}; give it with model")
    if len(found) > 1:
        spelled = ", ".join(f"{name} on {base}" for name, base in bases.items())
        raise ConfigError(f"adapters run side by side on one base model, and these have several: {spelled}")
    return found.pop()


def _one_task(configs: dict[str, Config], otherwise: TaskType) -> TaskType:
    tasks = {name: TaskType(config.task_type or otherwise) for name, config in configs.items()}
    if len(set(tasks.values())) > 1:
        spelled = ", ".join(f"{name} is for {task}" for name, task in tasks.items())
        raise ConfigError(f"adapters run side by side on one task, and these have several: {spelled}")
    return next(iter(tasks.values()), otherwise)


def _one_count(counts: dict[str, int | None]) -> int | None:
    if len(set(counts.values())) > 1:
        spelled = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ConfigError(f"adapters run side by side need classifiers with the same number of classes: {spelled}")
    return next(iter(counts.values()), None)


def _labels(places: dict[str, str], config: Any, given: list[str] | None) -> list[str] | None:
    """The classes by name: as given, as the training recipes say, or as the base model's config does."""
    trained = {name: labels for name, place in places.items() if (labels := _trained_classes(place))}
    if given is None and len(set(map(tuple, trained.values()))) > 1:
        spelled = "; ".join(f"{name} {', '.join(labels)}" for name, labels in trained.items())
        raise ConfigError(f"the adapters were trained on different classes, or in another order: {spelled}")
    own = [config.id2label[i] for i in range(config.num_labels)]
    found = given or next(iter(trained.values()), None) or (None if own[0] == "LABEL_0" else own)
    if found and len(found) != config.num_labels:
        raise ConfigError(f"{len(found)} classes are named ({', '.join(found)}), the model has {config.num_labels}")
    return found


def _trained_classes(place: str) -> list[str] | None:
    """The classes that the recipe beside an adapter names."""
    from ..files.recipe import RECIPE_NAME, read

    recipe = Path(place) / RECIPE_NAME
    labels = read(recipe).get("labels") if recipe.is_file() else None
    return [str(label) for label in labels] if labels else None


def _adapted(bare: Any, places: dict[str, str]) -> Any:
    """All adapters on one base, where the accelerator is."""
    import torch

    model = bare
    for number, (name, place) in enumerate(places.items()):
        if number:
            model.load_adapter(place, name)
        else:
            model = PeftModel.from_pretrained(bare, place, name)
    model = model.eval()
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model
