"""Load base models, and several adapters onto one base model, for the commands that run a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import checkpoint, provenance
from ..core.config import Config, TaskType
from ..errors import CheckpointError, ConfigError, first_line, nearest
from ..files.find import find_weights
from ..files.locate import Place, locate
from ..files.pull import resolve
from ..files.read import tensor_shapes
from ..ops.allocator import return_blocks
from ..upstream import models as upstream_models
from ..upstream.auto import AUTO_CLASSES, fitting
from ..upstream.quantisation import HEADS, Quantisation, quantisation
from . import stages
from .peft_model import PeftModel

BASE = "base"
"""The name of the base model in `Loaded.names`."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""A directory without any of these has no tokenizer."""
PLAIN = "none"
"""The value of `quantise` for a base model that stays as it is."""


@dataclass
class Loaded:
    """A base model with any number of adapters, one of which can be active at a time."""

    model: Any
    """A PeftModel, or the base model itself if there is no adapter."""
    tokenizer: Any
    base: str
    """The directory or hub id of the base model."""
    adapters: tuple[str, ...]
    task: TaskType
    labels: list[str] | None
    """The class names in order; None if the classes have no names, or the model is not a classifier."""
    base_is_whole: bool
    """False if the base model has no trained head for the task, so only its adapters can be evaluated."""
    remarks: tuple[str, ...] = ()
    """Sentences about the base model that the user should see, such as how it is quantised."""

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that can be run: the base, then the adapters."""
        return (BASE, *self.adapters)

    @property
    def facts(self) -> set[str]:
        """Columns of the data that the adapters' methods read from each row."""
        if not self.adapters:
            return set()
        return self.model._state.fact_names() - {"adapter_names"}

    def known(self, name: str) -> str:
        """Return the name if it can be run.

        Raises:
            ConfigError: there is no such name; the message gives the nearest.
        """
        if name not in self.names:
            choices = f"there are {', '.join(self.names)}{nearest(name, self.names)}"
            raise ConfigError(f"there is no model or adapter called {name!r}; {choices}")
        return name

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Run the block with one adapter active, or with none if the name is that of the base."""
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
    quantise: str | None = None,
    allow_absent: bool = False,
) -> Loaded:
    """Load a base model and put adapters on it.

    Args:
        adapters: directories or hub ids, or NAME=PLACE; the default name is that of the directory.
        model: the base model; None: the one that the adapters' configs name.
        task: the task to load the base model for if no adapter states one.
        labels: the class names in order; None: read from the training recipe next to an adapter.
        dtype: the base model's dtype, as in a recipe.
        quantise: how to quantise the base model, as in a recipe, or "none"; None: as it was for training the adapters.
        allow_absent: pass over tensors for modules that the base model lacks, with a warning.

    Raises:
        VeneerError: no base model is named, the adapters differ in base model or task, or a file is damaged.
    """
    places = named(adapters)
    configs = {name: Config.from_pretrained(place) for name, place in places.items()}
    base = _one_base(configs, model)
    how = _one_quantisation(places, quantise)
    task = _one_task(configs, task)
    is_classifier = task is TaskType.SEQ_CLS
    tokenizer = load_tokenizer(base)
    classes = _one_count(places) if is_classifier else None
    base_model, missing = load_model(
        base,
        AUTO_CLASSES[task],
        classes=classes,
        pad=pad_of(tokenizer),
        keys=_keys(places.values()),
        dtype=dtype_of(dtype),
        quantise=how,
    )
    if base_model.config.is_encoder_decoder:
        raise ConfigError(f"{base!r} is an encoder-decoder; only causal language models and classifiers are supported")
    class_names = _labels(places, base_model.config, labels) if is_classifier else None
    earlier = _one_start(places)
    if earlier is not None:
        base_model = stages.with_earlier(base_model, earlier)
    return Loaded(
        model=_adapted(base_model, places, allow_absent),
        tokenizer=tokenizer,
        base=base,
        adapters=tuple(places),
        task=task,
        labels=class_names,
        base_is_whole=not missing,
        remarks=_remarks(places, how, earlier),
    )


def named(adapters: Sequence[str]) -> dict[str, str]:
    """Directories or hub ids of adapters by name, from arguments of the form PLACE or NAME=PLACE.

    Raises:
        ConfigError: two adapters have the same name, or one has the base model's.
    """
    places: dict[str, str] = {}
    for text in adapters:
        name, equals, place = text.partition("=")
        if not equals or Path(text).exists():
            name = Path(text).resolve().name
            place = text
        if name in places or name == BASE:
            other = "the base model" if name == BASE else f"{places[name]!r}"
            raise ConfigError(
                f"{place!r} would have the name {name!r}, which {other} has; choose another name with NAME={place}"
            )
        places[name] = place
    return places


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """Load the tokenizer of a base model.

    Raises:
        ConfigError: there is no tokenizer.
    """
    from transformers import AutoTokenizer

    place = locate(model, revision)
    try:
        return AutoTokenizer.from_pretrained(place.name, revision=revision or "main", **place.arguments)
    except (OSError, ValueError) as error:  # ValueError if there are no tokenizer files
        reason = first_line(error)
        if Path(place.name).is_dir() and not any((Path(place.name) / name).is_file() for name in TOKENIZER_FILES):
            reason = "the directory has no tokenizer files; copy those of the original model into it"
        raise ConfigError(f"the tokenizer of {model!r} cannot be loaded: {reason}") from None


def positions_of(model: str, revision: str | None = None) -> int | None:
    """How many tokens a sequence of a base model may have; None if its config sets no limit."""
    from transformers import AutoConfig

    place = locate(model, revision)
    try:
        config = AutoConfig.from_pretrained(place.name, revision=revision or "main", **place.arguments)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the config of {model!r} cannot be read: {first_line(error)}") from None
    return upstream_models.positions_of(config)


def pad_of(tokenizer: Any) -> int:
    """The id of the padding token: the tokenizer's own, else its end of sequence, else 0."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


def dtype_of(name: str) -> Any:
    """The torch dtype for a name; "auto" is bfloat16 if the accelerator supports it, else float32."""
    import torch

    if name not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype {name!r} must be auto, float32 or bfloat16{nearest(name, ('float32', 'bfloat16'))}")
    if name != "auto":
        return getattr(torch, name)
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def _keys(places: Iterable[str], **hub: Any) -> list[str]:
    """The keys of adapters' files; none of a file that cannot be read, which loading the adapter explains."""
    keys: list[str] = []
    for place in places:
        with suppress(CheckpointError):
            keys += tensor_shapes(find_weights(place, **hub))
    return keys


def load_model(
    model: str,
    auto_class: str,
    *,
    classes: int | list[str] | None = None,
    pad: int | None = None,
    keys: Collection[str] = (),
    quantise: Quantisation | None = None,
    **kwargs: Any,
) -> tuple[Any, set[str]]:
    """Load a base model; returns it with the names of its parameters that the checkpoint lacks.

    Args:
        model: a directory, a name that `veneer pull` knows, or a hub id.
        auto_class: name of the transformers class.
        classes: the number of classes or their names, for a classifier.
        pad: the padding token if the config has none.
        keys: the keys of the adapters' files; of a composite model they say whether it is loaded whole.
        quantise: how to quantise it.
        kwargs: `dtype`, `revision` and other arguments of `from_pretrained`.

    Raises:
        ConfigError: there is no such model, or it cannot be quantised so.
    """
    import transformers
    from safetensors import SafetensorError

    hub_names = ("revision", "token", "cache_dir", "local_files_only")
    hub = {name: value for name, value in kwargs.items() if name in hub_names}
    is_plain = hub.keys() <= {"revision"}
    place = locate(model, hub.get("revision")) if is_plain else Place(resolve(model, hub.get("revision")))
    kwargs = {**kwargs, **place.arguments}
    try:
        config = transformers.AutoConfig.from_pretrained(place.name, **{**hub, **place.arguments})
        if classes is not None or pad is not None:
            kwargs = {**kwargs, "config": _described(config, classes, pad)}
        if quantise is not None:
            _check_unquantised(model, config)
            kwargs = kwargs | quantise.arguments(kwargs.get("dtype", config.dtype), classes is not None)
        auto = fitting(auto_class, config, keys)
        if auto is None:
            raise ConfigError(f"{model!r} is a {config.model_type}, for which transformers has no {auto_class}")
        loaded, info = auto.from_pretrained(place.name, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise ConfigError(
            f"the weights of {model!r} are damaged: {_damaged(Path(place.name), first_line(error))}; "
            "download or copy them again"
        ) from None
    except OSError as error:
        reason = first_line(error)
        raise ConfigError(
            f"the base model {model!r} cannot be loaded: {reason}; give another directory or hub id with model"
        ) from None
    if quantise is not None:
        quantise.convert_(loaded, kwargs.get("dtype", config.dtype))
        _leave_files_(loaded)
        provenance.prepare(loaded, quantised=quantise.as_dict())
    return loaded, set(info["missing_keys"])


def _leave_files_(model: Any) -> None:
    """Copy the weights that are not quantised out of the files, in place.

    transformers maps the files into memory. A single tensor that is still in a file keeps all of it mapped, with the
    pages from which the others were quantised: 400 MB for SmolLM2-135M.
    """
    from torch import nn

    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    return_blocks()


def _check_unquantised(model: str, config: Any) -> None:
    """Raise ConfigError if the files of a base model are quantised already."""
    present = getattr(config, "quantization_config", None)
    if present:
        method = present.get("quant_method") if isinstance(present, dict) else present.quant_method
        raise ConfigError(
            f"{model!r} is already quantised ({getattr(method, 'value', method)}); leave quantise out, or give the "
            "original model with model"
        )


def _damaged(directory: Path, reason: str) -> str:
    """The first damaged weights file in a directory and what is wrong with it; `reason` if none is found."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{str(file)!r} of {file.stat().st_size:,} bytes: {first_line(error)}"
    return reason


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
    """Load the base model of an adapter, without the adapter, but with those merged in that it was trained on.

    Args:
        adapter: a directory or a hub id.
        model: the base model; None: the one that the adapter's config names.
        config: the adapter's config; None: read from `adapter`.
        auto_class: name of the transformers class; None: chosen by the adapter's task.
        task: the task if the adapter's config states none.
        hub: arguments for the download of the adapter.
        kwargs: for the base model's `from_pretrained`.

    Raises:
        ConfigError: no base model is named, or the task is unknown.
    """
    hub = hub or {}
    config = config or Config.from_pretrained(adapter, **hub)
    name = model or config.base_model_name_or_path
    if not name:
        raise ConfigError(f"{str(adapter)!r} does not name its base model; give it with model")
    if auto_class is None:
        if isinstance(config.task_type, TaskType):
            task = config.task_type
        if task is None:
            raise ConfigError(f"{str(adapter)!r} states no task_type; use the AutoPeftModelFor... class of its task")
        auto_class = AUTO_CLASSES[task]
    if auto_class == AUTO_CLASSES[TaskType.SEQ_CLS]:
        classes = count_classes(adapter, **hub)
        if classes is not None:
            kwargs.setdefault("num_labels", classes)
    shared = {key: value for key, value in hub.items() if key in ("token", "cache_dir", "local_files_only")}
    revision = "main" if model else config.revision or "main"
    keys = _keys([str(adapter)], **hub)
    base_model, _ = load_model(name, auto_class, keys=keys, revision=revision, **shared, **kwargs)
    return stages.with_earlier(base_model, adapter, **hub)


def count_classes(adapter: str | Path, **hub: Any) -> int | None:
    """Number of classes of the classification head in an adapter's file; None if there is no such head."""
    from safetensors import SafetensorError, safe_open

    path = find_weights(adapter, **hub)
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if _is_head_weight(key)]  # noqa: SIM118 (not a dict)
            rows = [file.get_slice(key).get_shape()[0] for key in keys]
            return min(rows, default=None)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}") from None


def _is_head_weight(key: str) -> bool:
    return key.endswith(".weight") and not set(HEADS).isdisjoint(key.split("."))


def _described(config: Any, classes: int | list[str] | None, pad: int | None) -> Any:
    """A base model's config, with the classes and the padding token filled in."""
    if isinstance(classes, int):
        config.num_labels = classes
    elif classes is not None:
        config.num_labels = len(classes)
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: number for number, label in enumerate(classes)}
    if pad is not None and config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = pad
    return config


def _one_base(configs: dict[str, Config], model: str | None) -> str:
    """The base model: as given, else the one that all adapters name."""
    if model is not None:
        return model
    bases = {name: config.base_model_name_or_path for name, config in configs.items()}
    resolved = {resolve(base) for base in bases.values() if base}
    if not resolved and not configs:
        raise ConfigError("no base model is given, and no adapter that names one; give it with model (--model)")
    if not resolved:
        names = ", ".join(map(repr, configs))
        raise ConfigError(f"no base model is given, and {names} names none; give it with model (--model)")
    if len(resolved) > 1:
        spelled = _spelled(bases, "on")
        raise ConfigError(f"adapters can only be loaded together if they have the same base model: {spelled}")
    return resolved.pop()


def quantised_in_training(place: str | Path, **hub: Any) -> Quantisation | None:
    """How an adapter's base model was quantised for its training by `veneer train`; None if it was not."""
    noted = checkpoint.read_notes(place, **hub).get("preparation", {}).get("quantised")
    return quantisation(noted["scheme"], noted["options"]) if noted else None


def _one_quantisation(places: dict[str, str], given: str | None) -> Quantisation | None:
    """How to quantise the base model: as given, else as it was for training all adapters."""
    if given is not None:
        return None if given == PLAIN else quantisation(given)
    found = {name: quantised_in_training(place) for name, place in places.items()}
    distinct = set(map(str, found.values()))
    if len(distinct) > 1:
        spelled = "; ".join(f"{name} {how.scheme if how else PLAIN}" for name, how in found.items())
        raise ConfigError(
            f"the adapters were trained on a base model quantised in different ways ({spelled}); say with quantise "
            "(--quantise) how to load it for all of them"
        )
    return next(iter(found.values()), None)


def _one_start(places: dict[str, str]) -> str | None:
    """An adapter whose earlier adapters are merged into the base model for all; None if there are none.

    Raises:
        ConfigError: the adapters were trained on different base models in this sense.
    """
    merged = {name: tuple(stages.merged_below(place)) for name, place in places.items()}
    if len(set(merged.values())) > 1:
        raise ConfigError(
            f"the adapters {', '.join(places)} were trained on different base models, because earlier adapters were "
            "merged into those of some; load them one at a time"
        )
    return next((places[name] for name, digests in merged.items() if digests), None)


def _remarks(places: dict[str, str], used: Quantisation | None, earlier: str | None) -> tuple[str, ...]:
    """What the user should know about the base model: what is merged into it, and how it is quantised."""
    lines = []
    if earlier is not None:
        lines.append(f"the base model has the earlier adapter {str(Path(earlier) / stages.START)!r} merged in")
    if used is not None:
        lines.append(f"the base model is quantised to {used.scheme}")
    for name, place in places.items():
        trained = quantised_in_training(place)
        if trained is not None and trained != used:
            here = "this one is not quantised" if used is None else "this one otherwise"
            lines.append(f"{name} was trained on a base model quantised to {trained.scheme}; {here}")
    return tuple(lines)


def _one_task(configs: dict[str, Config], otherwise: TaskType) -> TaskType:
    """The task that all adapters state."""
    tasks = {name: TaskType(config.task_type or otherwise) for name, config in configs.items()}
    if len(set(tasks.values())) > 1:
        spelled = _spelled(tasks, "is for")
        raise ConfigError(f"adapters can only be loaded together if they have the same task: {spelled}")
    return next(iter(tasks.values()), otherwise)


def _one_count(places: dict[str, str]) -> int | None:
    """The number of classes that all adapters' heads have."""
    counts = {name: count_classes(place) for name, place in places.items()}
    if len(set(counts.values())) > 1:
        spelled = _spelled(counts, "has")
        raise ConfigError(f"classifiers can only be loaded together if they have the same number of classes: {spelled}")
    return next(iter(counts.values()), None)


def _spelled(values: Mapping[str, Any], verb: str) -> str:
    """The values of adapters by name, for an error: "a has 2, b has 3"."""
    return ", ".join(f"{name} {verb} {value}" for name, value in values.items())


def _labels(places: dict[str, str], config: Any, given: list[str] | None) -> list[str] | None:
    """The class names: as given, else from the training recipes, else from the base model's config."""
    trained = {}
    for name, place in places.items():
        labels = _trained_classes(place)
        if labels:
            trained[name] = labels
    distinct = {tuple(labels) for labels in trained.values()}
    if given is None and len(distinct) > 1:
        spelled = "; ".join(f"{name} {', '.join(labels)}" for name, labels in trained.items())
        raise ConfigError(f"the adapters were trained on different classes, or in another order: {spelled}")
    names = given or next(iter(trained.values()), None) or _classes_of(config)
    if names and len(names) != config.num_labels:
        raise ConfigError(
            f"{len(names)} class names are given ({', '.join(names)}), but the model has {config.num_labels} classes"
        )
    return names


def _classes_of(config: Any) -> list[str] | None:
    """The class names in a model's config; None if they are transformers' defaults."""
    names = [config.id2label[i] for i in range(config.num_labels)]
    return None if names[0] == "LABEL_0" else names


def _trained_classes(place: str) -> list[str] | None:
    """The class names in the training recipe next to an adapter, if there is one."""
    from ..files.recipe import RECIPE_NAME, read

    recipe = Path(place) / RECIPE_NAME
    if not recipe.is_file():
        return None
    labels = read(recipe).get("labels")
    return [str(label) for label in labels] if labels else None


def _adapted(base_model: Any, places: dict[str, str], allow_absent: bool) -> Any:
    """The base model with all adapters, in evaluation mode, on the accelerator if there is one."""
    import torch

    model = base_model
    for name, place in places.items():
        if model is base_model:
            model = PeftModel.from_pretrained(base_model, place, name, allow_absent=allow_absent)
        else:
            model.load_adapter(place, name, allow_absent=allow_absent)
    model = model.eval()
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model
