"""PEFT's config classes: ours, read, written and checked as PEFT does it."""

from __future__ import annotations

import copy
import enum
import importlib.metadata
import inspect
import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ..core import config as core_config
from ..core.config import Config, PromptConfig, TaskType, all_methods, default_of
from ..errors import CheckpointError, ConfigError
from ..files.find import find_file
from ..files.read import read_json, read_pickle
from ..files.write import write_atomically
from .strict import is_strict, settle
from .tables import methods as table
from .tables.refusals import check_as_peft
from .tables.words import is_at_once

PeftType = enum.Enum("PeftType", {name: name for name in table.METHODS}, type=str, module=__name__)  # type: ignore[misc]
PromptTuningInit = enum.Enum(  # type: ignore[misc]
    "PromptTuningInit", {n: n for n in ("TEXT", "SAMPLE_VOCAB", "RANDOM")}, type=str, module=__name__
)
PromptEncoderReparameterizationType = enum.Enum(  # type: ignore[misc]
    "PromptEncoderReparameterizationType", {n: n for n in ("MLP", "LSTM")}, type=str, module=__name__
)
MultitaskPromptTuningInit = enum.Enum(  # type: ignore[misc]
    "MultitaskPromptTuningInit",
    {n: n for n in ("TEXT", "RANDOM", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")},
    type=str,
    module=__name__,
)

UNWRITTEN = {"runtime_config"}


class Names(set[str]):
    """`target_modules` as PEFT has it, a set; it is gone through in one order, so that files are the same each time."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__()))


@dataclass
class LoraRuntimeConfig:
    """How a LoRA is run, which no file holds."""

    ephemeral_gpu_offload: bool = False
    """PEFT moves weights to a GPU for the time they are worked on; computing where they are needs no setting."""


class Called(type):
    """Calling a config class as PEFT's: `peft_type` may be said again, and unknown fields are a TypeError."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        kind = given.pop("peft_type", None)
        if kind is not None and cls is PeftConfig:
            return CONFIGS[_type(kind)](**given)
        unknown = [name for name in given if name not in {f.name for f in fields(cls)}]  # type: ignore[arg-type]
        if unknown and not is_strict():
            raise TypeError(f"{cls.__name__}.__init__() got an unexpected keyword argument {unknown[0]!r}")
        return super().__call__(*args, **given)


@dataclass(kw_only=True)
class PeftConfig(Config, metaclass=Called):
    """PEFT's base of all configs."""

    auto_mapping: dict | None = None
    """The base model's class and module, where no task type says which class loads it."""
    peft_version: str | None = None
    """The version that wrote the file."""

    peft_type: ClassVar[Any] = None
    is_adaption_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if getattr(self, "loftq_config", None) == {}:
            self.loftq_config = None
        if self.task_type is not None and self.task_type not in [t.value for t in TaskType]:
            raise ConfigError(
                f"Invalid task type: '{self.task_type}'. Must be one of the following task types: "
                f"{', '.join(t.value for t in TaskType)}."
            )
        check_as_peft(self)
        try:
            super().__post_init__()
        except ConfigError as error:
            if is_strict() or is_at_once(error):
                raise
            self.__dict__["refused"] = error  # PEFT looks at most settings when the adapter is put on
        self.peft_version = self.peft_version or self._get_peft_version()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name, None), (list, tuple, set)):
                setattr(self, name, Names(getattr(self, name)))

    @staticmethod
    def _get_peft_version() -> str:
        """The version that a file says wrote it: the module's, and of one that is not released also the commit."""
        module = sys.modules.get("peft.config")
        version = str(getattr(module, "__version__", table.VERSION))
        if ".dev" not in version:
            return version
        try:
            commit = module._get_commit_hash("peft")  # type: ignore[union-attr]
        except Exception:  # whatever goes wrong there must not stop a config from being made
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
        """PEFT fails when such a model is called."""
        try:
            super().refuse_cacheless(model)  # type: ignore[misc]
        except ConfigError as error:
            settle(error)

    def _source(self) -> Any:
        """Multitask prompt tuning's start: from a pickle too, tensors only."""
        path = Path(str(self.prompt_tuning_init_state_dict_path))  # type: ignore[attr-defined]
        is_pickle = path.suffix in (".bin", ".pt") and path.is_file() and not is_strict()
        return read_pickle(path) if is_pickle else super()._source()  # type: ignore[misc]

    def check_rank(self, path: str, out: int, columns: int) -> None:
        """AdaMSS's: PEFT goes on where the clusters would follow from rounding."""
        try:
            super().check_rank(path, out, columns)  # type: ignore[misc]
        except ConfigError as error:
            settle(error)

    def role(self, path: str) -> str:
        """Lily's: which entry of the targets a module is of, as they were written and not as they were narrowed."""
        written: Any = copy.copy(self)
        written.target_modules = self.__dict__.get("written", written.target_modules)
        return super(PeftConfig, written).role(path)  # type: ignore[misc]

    # The file

    def to_dict(self) -> dict[str, Any]:
        """Every field, as PEFT's configs have them."""
        kind = None if self.peft_type is None else self.peft_type.value
        found: dict[str, Any] = {"peft_type": self.peft_type}
        absent = table.ABSENT.get(str(kind), "").split()
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in UNWRITTEN:
                continue
            if f.name not in absent or value != default_of(f):
                found[f.name] = core_config._plain(value)
        if "loftq_config" in found:
            found["loftq_config"] = found["loftq_config"] or {}
        return found

    def save_pretrained(self, directory: str | Path, name: str = core_config.CONFIG_NAME, **settings: Any) -> None:
        if os.path.isfile(directory):
            raise AssertionError(f"Provided path ({directory}) should be a directory, not a file")
        content = self.to_dict()
        content["auto_mapping"] = settings.get("auto_mapping_dict") or content.get("auto_mapping")
        content = {name: list(v) if isinstance(v, (set, tuple)) else v for name, v in content.items()}
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2, sort_keys=True)
        write_atomically(Path(directory) / name, text.encode())
        if settings.get("push_to_hub"):
            from ..model.card import push_folder

            push_folder(directory, **settings)

    def push_to_hub(self, repo_id: str, **settings: Any) -> Any:
        from ..model.card import push

        return push(self, repo_id, **settings)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **settings: Any
    ) -> Any:
        hub, own, _ = cls._split_kwargs(settings)
        content = cls.from_json_file(_config_file(pretrained_model_name_or_path, subfolder=subfolder, **hub))
        return cls.from_peft_type(**{**own, **content})

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
        """The config that `peft_type` says; fields it does not know are a warning, as a newer PEFT may have them."""
        kind = given.pop("peft_type", None)
        found = cls if kind is None else CONFIGS[_type(kind)]
        known = {f.name for f in fields(found)} | set(found.foreign)
        unknown = {name: value for name, value in given.items() if name not in known}
        if unknown and is_strict():
            raise ConfigError(f"{found.__name__} has no such fields: {', '.join(unknown)}")
        if unknown and kind is None:
            raise TypeError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
            )
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {sorted(unknown)} for class {found.__name__}, these are ignored. This "
                "probably means that you're loading a configuration file that was saved using a higher version of the "
                "library and additional parameters have been introduced since.",
                stacklevel=3,
            )
        config = found(**{name: value for name, value in given.items() if name in {f.name for f in fields(found)}})
        config.__dict__["from_file"] = True
        return config

    from_dict = classmethod(lambda cls, content: cls.from_peft_type(**content))  # type: ignore[assignment]

    @classmethod
    def check_kwargs(cls, **given: Any) -> dict[str, Any]:
        return given

    @classmethod
    def _split_kwargs(cls, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """(the hub's arguments, this config's fields, the rest)."""
        hub = {name: value for name, value in given.items() if name in hub_arguments()}
        own = {n: v for n, v in given.items() if n not in hub and n in {f.name for f in fields(cls)}}
        return hub, own, {name: value for name, value in given.items() if name not in hub and name not in own}

    @classmethod
    def _get_peft_type(cls, model_id: str | Path, **hub: Any) -> str:
        return cls.from_json_file(_config_file(model_id, **hub))["peft_type"]


def _get_commit_hash(package: str) -> str | None:
    """The commit that a package was installed from, where its metadata tell."""
    try:
        found = importlib.metadata.distribution(package).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return None if not found else json.loads(found).get("vcs_info", {}).get("commit_id")


def hub_arguments() -> set[str]:
    from huggingface_hub import hf_hub_download

    return set(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename"}


def _config_file(source: str | Path, **hub: Any) -> Path:
    try:
        return find_file(source, core_config.CONFIG_NAME, **hub)
    except CheckpointError as error:
        raise CheckpointError(f"Can't find '{core_config.CONFIG_NAME}' at '{source}': {error}") from None


def _type(kind: Any) -> Any:
    """The member of `PeftType`, also by a name that the method once had."""
    try:
        return PeftType(kind)
    except ValueError:
        older = {alias: c.peft_type for c in all_methods().values() for alias in c.aliases}
        if kind not in older:
            raise ConfigError(f"peft_type {kind!r} is not one of PEFT {table.VERSION}'s") from None
        return PeftType(str(older[kind]))


@dataclass(kw_only=True)
class PromptLearningConfig(PeftConfig, PromptConfig):
    """PEFT's base of the prompts' configs."""


@dataclass(kw_only=True)
class LoraFields(PeftConfig):
    """What PEFT's LoRA has besides, for libraries that are no part of this."""

    megatron_config: dict | None = None
    """Megatron's own settings, which pass through."""
    megatron_core: str | None = "megatron.core"
    """Where Megatron's layers come from."""
    runtime_config: Any = field(default_factory=LoraRuntimeConfig)
    """`LoraRuntimeConfig`."""


def _config_class(kind: str, row: table.Row) -> Any:
    ours = next(config for config in all_methods().values() if config.__name__ == row.config)
    base = PromptLearningConfig if issubclass(ours, PromptConfig) else PeftConfig
    base = LoraFields if kind in ("LORA", "ADALORA") else base
    namespace = {
        "peft_type": PeftType(kind),
        "__module__": f"peft.tuners.{row.package}.config",
        "__doc__": ours.__doc__,
        "is_adaption_prompt": kind == "ADAPTION_PROMPT",
    }
    return dataclass(kw_only=True)(Called(row.config, (base, ours), namespace))


CONFIGS: dict[Any, Any] = {PeftType(kind): _config_class(kind, row) for kind, row in table.METHODS.items()}
LoraConfig = CONFIGS[PeftType("LORA")]


def as_ours(config: Any) -> Config:
    """The same settings in veneer's own class, without PEFT's further fields."""
    kind = next(c for c in type(config).__mro__ if c in all_methods().values())
    made: Config = copy.copy(config)
    made.__class__ = kind
    made.__dict__ = {f.name: _without_sets(getattr(config, f.name)) for f in fields(kind)}  # type: ignore[arg-type]
    return made


def _without_sets(value: Any) -> Any:
    return list(value) if isinstance(value, set) else value


def get_peft_config(config_dict: dict[str, Any]) -> Any:
    """The config that a mapping describes."""
    return CONFIGS[_type(config_dict["peft_type"])](**{k: v for k, v in config_dict.items() if k != "peft_type"})


def as_peft(config: Any) -> Any:
    """A config of veneer's own class as the class that stands for PEFT's."""
    if isinstance(config, PeftConfig) or not isinstance(config, Config):
        return config
    found = CONFIGS[PeftType(str(config.peft_type))]
    return found(**{f.name: getattr(config, f.name) for f in fields(config)})
