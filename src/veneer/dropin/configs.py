"""PEFT's config classes: veneer's configs, which are read, written and checked as in PEFT."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import importlib.metadata
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from ..core import config as core_config
from ..core.config import Config, PromptConfig, TaskType, all_methods, default_of
from ..errors import CheckpointError, ConfigError
from ..files.checked import Settings
from ..files.find import find_file
from ..files.read import read_json, read_pickle
from ..files.write import write_atomically
from .strict import is_strict, settle
from .tables import methods as table
from .tables import names
from .tables.refusals import check_as_peft
from .wording import is_at_once, pefts_words

PeftType = enum.Enum("PeftType", {name: name for name in table.METHODS}, type=str, module=__name__)  # type: ignore[misc]


class PromptTuningInit(str, enum.Enum):
    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class PromptEncoderReparameterizationType(str, enum.Enum):
    MLP = "MLP"
    LSTM = "LSTM"


class MultitaskPromptTuningInit(str, enum.Enum):
    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


UNWRITTEN = {"runtime_config"}
"""Fields that are not written to files."""


class Names(set[str]):
    """A set of names, as PEFT has for `target_modules`; it iterates in sorted order, so that files are reproducible."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__()))


@dataclass
class LoraRuntimeConfig:
    """Runtime settings of a LoRA, which are not saved."""

    ephemeral_gpu_offload: bool = False
    """Ignored; kept for PEFT compatibility. PEFT moves weights to a GPU temporarily; veneer does not move them."""


class Called(type):
    """Metaclass for PEFT's way to create configs: fields in its order, also `peft_type`; unknown ones are refused."""

    @property
    def __signature__(cls) -> inspect.Signature:
        """PEFT's parameters with the defaults of veneer's fields."""
        home = cls.__module__ if cls.__module__.startswith("peft.") else "peft.config"
        theirs = names.constructor(home, cls.__name__)
        if theirs is None:
            raise AttributeError("__signature__")
        own = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
        parameters = []
        for parameter in theirs.parameters.values():
            default = _shown_default(own[parameter.name]) if parameter.name in own else None
            parameters.append(parameter.replace(default=default))
        return inspect.Signature(parameters)

    def __call__(cls, *args: Any, **given: Any) -> Any:
        if args:
            order = list(inspect.signature(cls).parameters)
            if len(args) > len(order):
                raise TypeError(f"{cls.__name__}() takes at most {len(order)} arguments, but {len(args)} were given")
            for name, value in zip(order, args, strict=False):
                if name in given:
                    raise TypeError(f"{cls.__name__}() got multiple values for argument {name!r}")
                given[name] = value
        kind = given.pop("peft_type", None)
        if kind is not None and cls is PeftConfig:
            return CONFIGS[_type(kind)](**given)
        if not is_strict():
            known = _field_names(cls)
            for name in given:
                if name not in known:
                    raise TypeError(f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}")
        return super().__call__(**given)


def _shown_default(field: Any) -> Any:
    """A field's default; the mark that dataclasses show if a function makes it."""
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses._HAS_DEFAULT_FACTORY  # type: ignore[attr-defined]
    return field.default


def _field_names(config_class: Any) -> set[str]:
    return {field.name for field in fields(config_class)}


@dataclass(kw_only=True)
class PeftConfig(Config, metaclass=Called):
    """PEFT's base class of all configs."""

    auto_mapping: dict | None = None
    """Class and module of the base model, for models without a task type."""
    peft_version: str | None = None
    """Version of PEFT that wrote the file."""

    peft_type: ClassVar[Any] = None
    is_adaption_prompt: ClassVar[bool] = False

    @pefts_words()
    def __post_init__(self) -> None:
        if getattr(self, "loftq_config", None) == {}:
            self.loftq_config = None
        self._check_task_type()
        check_as_peft(self)
        try:
            super().__post_init__()
        except ConfigError as error:
            if is_strict() or is_at_once(error):
                raise
            self.__dict__["refused"] = error  # PEFT checks most settings only when the adapter is attached
        for value in self.__dict__.values():
            if isinstance(value, Settings) and type(value).__module__.startswith("veneer."):
                value.__class__ = settings_class(type(value))  # type: ignore[arg-type]
        self.peft_version = self.peft_version or self._get_peft_version()
        for name in ("target_modules", "exclude_modules"):
            targets = getattr(self, name, None)
            if isinstance(targets, (list, tuple, set)):
                setattr(self, name, Names(targets))

    def _check_task_type(self) -> None:
        task_types = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in task_types:
            raise ConfigError(
                f"Invalid task type: '{self.task_type}'. Must be one of the following task types: "
                f"{', '.join(task_types)}."
            )

    @staticmethod
    def _get_peft_version() -> str:
        """The PEFT version to write to a file; a development version is followed by its commit."""
        module = sys.modules.get("peft.config")
        version = str(getattr(module, "__version__", table.VERSION))
        if ".dev" not in version:
            return version
        try:
            commit = module._get_commit_hash("peft")  # type: ignore[union-attr]
        except Exception:  # a failure here must not prevent making a config
            warnings.warn(
                "A dev version of PEFT is used but there was an error while trying to determine the commit hash. "
                "Please open an issue: https://github.com/huggingface/peft/issues",
                stacklevel=5,
            )
            commit = None
        return f"{version}@{commit or 'UNKNOWN'}"

    @property
    def is_prompt_learning(self) -> bool:
        return isinstance(self, PromptConfig)

    def semantic_fields(self) -> list[str]:
        return as_ours(self).semantic_fields()

    def refuse_cacheless(self, model: str) -> None:
        """Warn, where veneer raises, that the model has no cache: PEFT fails only when the model is called."""
        try:
            super().refuse_cacheless(model)  # type: ignore[misc]
        except ConfigError as error:
            settle(error)

    def _source(self) -> Any:
        """Initial tensors of multitask prompt tuning; may also be a pickle, from which only tensors are read."""
        path = Path(str(self.prompt_tuning_init_state_dict_path))  # type: ignore[attr-defined]
        is_pickle = path.suffix in (".bin", ".pt") and path.is_file() and not is_strict()
        if is_pickle:
            return read_pickle(path)
        return super()._source()  # type: ignore[misc]

    def check_rank(self, path: str, out: int, columns: int) -> None:
        """Warn, where veneer raises, of an AdaMSS rank whose clusters depend on rounding: PEFT accepts it."""
        try:
            super().check_rank(path, out, columns)  # type: ignore[misc]
        except ConfigError as error:
            settle(error)

    def role(self, path: str) -> str:
        """The entry of Lily's `target_modules` that matches a module, before entries became full paths."""
        written: Any = copy.copy(self)
        if "written" in self.__dict__:
            written.target_modules = self.__dict__["written"]
        return super(PeftConfig, written).role(path)  # type: ignore[misc]

    # The file

    def to_dict(self) -> dict[str, Any]:
        """All fields that PEFT's config has, with their values."""
        kind = None if self.peft_type is None else self.peft_type.value
        absent = table.ABSENT.get(str(kind), "").split()
        content: dict[str, Any] = {"peft_type": self.peft_type}
        for field in fields(self):
            if field.name in UNWRITTEN:
                continue
            value = getattr(self, field.name)
            if field.name in absent and value == default_of(field):
                continue
            content[field.name] = core_config._plain(value)
        if "loftq_config" in content:
            content["loftq_config"] = content["loftq_config"] or {}
        return content

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, name: str = core_config.CONFIG_NAME, **settings: Any
    ) -> None:
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        content = self.to_dict()
        content["auto_mapping"] = settings.get("auto_mapping_dict") or content.get("auto_mapping")
        for field_name, value in content.items():
            if isinstance(value, (set, tuple)):
                content[field_name] = list(value)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2, sort_keys=True)
        write_atomically(Path(save_directory) / name, text.encode())
        if settings.get("push_to_hub"):
            from ..model.card import push_folder

            push_folder(save_directory, **settings)

    def push_to_hub(self, repo_id: str, **settings: Any) -> Any:
        from ..model.card import push

        return push(self, repo_id, **settings)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **settings: Any
    ) -> Any:
        hub, defaults, _ = cls._split_kwargs(settings)
        file = _config_file(pretrained_model_name_or_path, subfolder=subfolder, **hub)
        content = cls.from_json_file(file)
        return cls.from_peft_type(**(defaults | content))

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **ignored: Any) -> dict[str, Any]:
        content = read_json(Path(path_json_file))
        if "runtime_config" in content:
            warnings.warn(
                "The configuration file contains a `runtime_config` key. This is ignored. Runtime configurations are "
                "only valid at runtime.",
                stacklevel=2,
            )
            del content["runtime_config"]
        return content

    @classmethod
    def from_peft_type(cls, **given: Any) -> Any:
        """Create the config for `peft_type`; unknown fields, perhaps of a newer PEFT, only cause a warning."""
        kind = given.pop("peft_type", None)
        config_class = cls if kind is None else CONFIGS[_type(kind)]
        names = _field_names(config_class)
        settings = {name: value for name, value in given.items() if name in names}
        unknown = [name for name in given if name not in names and name not in config_class.foreign]
        if unknown and is_strict():
            raise ConfigError(f"{config_class.__name__} has no such fields: {', '.join(unknown)}")
        if unknown and kind is None:
            raise TypeError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
            )
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {sorted(unknown)} for class {config_class.__name__}, these are ignored. "
                "This probably means that you're loading a configuration file that was saved using a higher version of "
                "the library and additional parameters have been introduced since.",
                stacklevel=3,
            )
        config = config_class(**settings)
        config.__dict__["from_file"] = True
        return config

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Any:
        return cls.from_peft_type(**content)

    @classmethod
    def check_kwargs(cls, **given: Any) -> dict[str, Any]:
        return given

    @classmethod
    def _split_kwargs(cls, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Split into (arguments of the Hub's download, fields of this config, the rest)."""
        names_of_hub = hub_arguments()
        names = _field_names(cls)
        hub: dict[str, Any] = {}
        of_config: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for name, value in given.items():
            if name in names_of_hub:
                hub[name] = value
            elif name in names:
                of_config[name] = value
            else:
                rest[name] = value
        return hub, of_config, rest

    @classmethod
    def _get_peft_type(cls, model_id: str | Path, **hub: Any) -> str:
        return cls.from_json_file(_config_file(model_id, **hub))["peft_type"]


def _get_commit_hash(pkg_name: str) -> str | None:
    """The commit that a package was installed from, if its metadata record one."""
    try:
        direct_url = importlib.metadata.distribution(pkg_name).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    if not direct_url:
        return None
    return json.loads(direct_url).get("vcs_info", {}).get("commit_id")


def hub_arguments() -> set[str]:
    """Names of the arguments that select and authorise a download from the Hub."""
    from huggingface_hub import hf_hub_download

    parameters = inspect.signature(hf_hub_download).parameters
    return set(parameters) - {"repo_id", "filename"}


def _config_file(source: str | Path, **hub: Any) -> Path:
    try:
        return find_file(source, core_config.CONFIG_NAME, **hub)
    except CheckpointError as error:
        raise CheckpointError(f"Can't find '{core_config.CONFIG_NAME}' at '{source}': {error}") from None


def _type(kind: Any) -> Any:
    """The member of `PeftType` for a name, which may be a former name of the method."""
    try:
        return PeftType(kind)
    except ValueError:
        pass
    for config in all_methods().values():
        if kind in config.aliases:
            return PeftType(str(config.peft_type))
    raise ConfigError(f"peft_type {kind!r} does not exist in PEFT {table.VERSION}")


@functools.cache
def settings_class(ours: type) -> type:
    """A class of settings for LoRA whose errors are in PEFT's words."""
    module = "peft.tuners.lora.config"
    namespace = {
        "__module__": module,
        "__doc__": ours.__doc__,
        "__post_init__": pefts_words()(ours.__post_init__),  # type: ignore[attr-defined]
    }
    theirs = names.constructor(module, ours.__name__)
    if theirs is not None:
        namespace["__init__"] = _in_order(ours.__init__, theirs)  # type: ignore[misc]
    return type(ours.__name__, (ours,), namespace)


def _in_order(init: Callable[..., None], theirs: inspect.Signature) -> Callable[..., None]:
    """An `__init__` that also takes its arguments by position, in PEFT's order."""
    order = list(theirs.parameters)

    def __init__(self: Any, *args: Any, **given: Any) -> None:
        init(self, **dict(zip(order, args, strict=False)), **given)

    own = inspect.signature(init).parameters
    parameters = [own["self"]]
    for name in order:
        parameters.append(own[name].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD))
    __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return __init__


@dataclass(kw_only=True)
class PromptLearningConfig(PeftConfig, PromptConfig):
    """PEFT's base class of the configs of prompt methods."""


@dataclass(kw_only=True)
class LoraFields(PeftConfig):
    """Fields of PEFT's LoRA configs that veneer does not use."""

    megatron_config: dict | None = None
    """Settings of Megatron. Kept and saved, without effect."""
    megatron_core: str | None = "megatron.core"
    """Module that Megatron's layers come from. Kept and saved, without effect."""
    runtime_config: Any = dataclasses.field(default_factory=LoraRuntimeConfig)
    """A `LoraRuntimeConfig`, which is not saved."""


def _config_class(kind: str, row: table.Row) -> Any:
    """Create the config class with PEFT's name, derived from veneer's config of a method and PEFT's base class."""
    ours = next(config for config in all_methods().values() if config.__name__ == row.config)
    base: type[PeftConfig] = PeftConfig
    if issubclass(ours, PromptConfig):
        base = PromptLearningConfig
    elif kind in ("LORA", "ADALORA"):
        base = LoraFields
    namespace = {
        "peft_type": PeftType(kind),
        "__module__": f"peft.tuners.{row.package}.config",
        "__doc__": ours.__doc__,
        "is_adaption_prompt": kind == "ADAPTION_PROMPT",
    }
    config_class = Called(row.config, (base, ours), namespace)
    return dataclass(kw_only=True)(config_class)


CONFIGS: dict[Any, Any] = {PeftType(kind): _config_class(kind, row) for kind, row in table.METHODS.items()}
LoraConfig = CONFIGS[PeftType("LORA")]


def as_ours(config: Any) -> Config:
    """A config as veneer's own class, without the fields that only PEFT has."""
    methods = all_methods().values()
    own_class: Any = next(base for base in type(config).__mro__ if base in methods)
    settings = {}
    for field in fields(own_class):
        value = getattr(config, field.name)
        settings[field.name] = list(value) if isinstance(value, set) else value
    ours: Config = copy.copy(config)
    ours.__class__ = own_class
    ours.__dict__ = settings
    return ours


def get_peft_config(config_dict: dict[str, Any]) -> Any:
    """The config that a mapping describes."""
    settings = dict(config_dict)
    config_class = CONFIGS[_type(settings.pop("peft_type"))]
    return config_class(**settings)


def as_peft(config: Any) -> Any:
    """A config of one of veneer's own classes as its counterpart under PEFT's name; others are returned as they are."""
    if isinstance(config, PeftConfig) or not isinstance(config, Config):
        return config
    config_class = CONFIGS[PeftType(str(config.peft_type))]
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    return config_class(**settings)
