"""Configs: the fields of each method, in Hugging Face PEFT's names and file format, and the hooks that the core calls.

Every config class registers itself under the name of its file. Unknown, mistyped and contradictory fields are errors.
"""

from __future__ import annotations

import copy
import enum
import importlib
import json
import math
import pkgutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..errors import ConfigError, listing, nearest
from ..files.checked import Checked
from ..files.find import find_file
from ..files.read import read_json
from ..files.regex import fits, pattern
from ..files.write import write_atomically

if TYPE_CHECKING:
    from ..targets.target import Target
    from .adapter import Adapter
    from .prompt import Prompt, Spec

CONFIG_NAME = "adapter_config.json"


class Name(str):
    """A string with a `value` attribute, like a member of a string enum."""

    @property
    def value(self) -> str:
        return str(self)


class TaskType(str, enum.Enum):
    """The task that a model is trained for. It decides which head is trained and saved with the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


TASK_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""The modules that are trained and saved with the adapter for a task, if the model has them."""

METHODS: dict[str, type[Config]] = {}
"""The config class of each method, by method name, which is the name of its file. Filled by `all_methods()`."""


def all_methods() -> dict[str, type[Config]]:
    """Import the files of all methods and return their config classes by method name."""
    from .. import methods as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return METHODS


@dataclass(kw_only=True)
class Config(Checked):
    """Fields that all methods have. Subclasses set `peft_type` and `adapter`, and add fields of their own."""

    task_type: TaskType | str | None = None
    """One of the task types in `TaskType`; None if no task applies."""
    base_model_name_or_path: str | None = None
    """The name or path of the base model; filled in when an adapter is attached."""
    revision: str | None = None
    """The revision of the base model on the hub."""
    inference_mode: bool = False
    """Whether the adapter is frozen; true in every saved file."""
    modules_to_save: list[str] | None = None
    """Modules that are trained and saved in full with the adapter, such as a new head or resized embeddings."""

    peft_type: ClassVar[Name]
    adapter: ClassVar[type[Adapter]]
    aliases: ClassVar[tuple[str, ...]] = ()
    """Values of `peft_type` that older files use for this method."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Maps the attribute names in older files to the adapter's current attribute names."""
    facts: ClassVar[tuple[str, ...]] = ()
    """Keyword arguments of a model call (and of `generate`) that are meant for the adapter, not for the model."""
    generate_with: ClassVar[Mapping[str, Any]] = {}
    """Arguments that `generate` must be called with."""
    changes_call: ClassVar[bool] = False
    """Whether the method changes the model's inputs or cache, so that not every model can take it."""
    reads_encoder: ClassVar[bool] = False
    """Whether `before` is also called for the encoder, which `generate` calls directly and not through the model."""
    foreign: ClassVar[Mapping[str, Any]] = {}
    """PEFT's defaults for fields that veneer lacks, so that files with these defaults load. Empty ones are omitted."""
    from_file: ClassVar[bool] = False
    """Set on a config that was read from a file: its adapter gets its tensors from a file, too."""
    file_holds_embedding: ClassVar[bool] = True
    """Whether PEFT's files contain the base embedding if the adapter targets it by name."""
    learning_rate: ClassVar[float] = 1e-3
    """The learning rate if the user gives none."""
    recommended: ClassVar[Mapping[str, Any]] = {}
    """Settings to train with if the user gives none, for methods that learn little with PEFT's defaults."""
    for_training: ClassVar[tuple[str, ...]] = ()
    """Names of fields that only training reads, besides dropout. They may change when a saved adapter is trained on."""
    example: ClassVar[Mapping[str, Any]] = {}
    """Example values for the settings that must be given."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        package, _, module = cls.__module__.rpartition(".")
        if package.endswith(".methods"):
            METHODS[module] = cls

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type is not None:
            names = [t.value for t in TaskType]
            if self.task_type not in names:
                raise ConfigError(f"task_type {self.task_type!r} is unknown; use one of {', '.join(names)} or None")
            self.task_type = TaskType(self.task_type)

    # Hooks that a method may override

    def semantic_fields(self) -> list[str]:
        """The fields that decide what the tensors mean: `modules_to_save` and the method's own, except for dropout."""
        return [f.name for f in fields(self) if f.name not in COMMON - {"modules_to_save"} and "dropout" not in f.name]

    def members(self) -> Sequence[Config]:
        """The configs of the methods that this config combines; only the config itself for a single method."""
        return (self,)

    def depends_on_call(self) -> bool:
        """Whether the output for a token depends on the call that computes it, and not only on its activations.

        Then a sequence must be computed in the calls that `generate` makes: not in parts, not beside others.
        """
        overrides = type(self).before is not Config.before or type(self).after is not Config.after
        return overrides or bool(self.generate_with)

    def reshape(self, model: nn.Module) -> Any:
        """Change the model's layers before adapters are attached. Returns an object with `undo()`, or None."""
        return None

    def ties(self) -> bool:
        """Whether a trained copy of a module is also used by the modules whose weights are tied to it."""
        return False

    def join(self, adapter: Adapter) -> Adapter:
        """The adapter to attach for one that a member of this config has built; by default the same."""
        return adapter

    def build(self, target: Target, shared: nn.Module | None = None, **kwargs: Any) -> Adapter:
        """Create the adapter for one target."""
        return self.adapter(self, target, shared, **kwargs)

    def build_shared(self, targets: Sequence[Target]) -> nn.Module | None:
        """Create the module that all layers of an adapter share (projections, banks, gates); None if there is none."""
        return None

    def before(self, shared: nn.Module | None, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        """Compute facts once per model call and store them in `facts`; this adapter's own under the key `shared`."""

    def after(self, facts: dict[Any, Any], output: Any) -> None:
        """Inspect the output of a model call, for example to mark its cache for the calls that continue from it."""

    def loss(self, adapters: Sequence[Adapter]) -> Tensor | None:
        """A term to add to the model's loss, or None."""
        return None

    def schedule(self, parts: Mapping[str, Any]) -> Any:
        """An object with `.step(n)`, called after the n-th optimizer step, or None.

        Args:
            parts: the adapters by path; the path of a prompt is "".
        """
        return None

    # The file

    def saved(self) -> Config:
        """The config to write to the file: this one, unless the saved tensors need other settings."""
        return copy.copy(self)

    def to_dict(self) -> dict[str, Any]:
        """The content of the file: the method's own fields, and the common fields that differ from their defaults.

        The fields in `ALWAYS_WRITTEN` are written in any case. Models that every machine can find are named without
        the path that they have on this machine.
        """
        from ..files.pull import name_anywhere

        content = {"peft_type": str(self.peft_type)}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in COMMON or f.name in ALWAYS_WRITTEN or value != default_of(f):
                content[f.name] = _plain(value)
            if f.name in MODEL_NAMES and value:
                content[f.name] = name_anywhere(str(value))
        return dict(sorted(content.items()))

    def save_pretrained(self, directory: str | Path, name: str = CONFIG_NAME) -> None:
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(directory) / name, text.encode())

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub: Any) -> Config:
        """Read the `adapter_config.json` of a local directory or a hub repository."""
        return cls.from_dict(read_json(find_file(source, CONFIG_NAME, **hub)))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Config:
        """Create the config of any method from a file's content. Unknown fields raise ConfigError, unless empty."""
        kind = str(content.get("peft_type", ""))
        config_class = _called(kind)
        if config_class is None:
            types = [str(config.peft_type) for config in METHODS.values()]
            raise ConfigError(f"peft_type {kind!r} is not a method of veneer{nearest(kind.upper(), types)}")
        known = {f.name for f in fields(config_class)}
        harmless = {"peft_type", "auto_mapping", "peft_version"}
        unknown = {
            name: value
            for name, value in content.items()
            if name not in known | harmless and value not in (None, False, "", [], {}, config_class.foreign.get(name))
        }
        if unknown:
            lines = [f"{name} = {value!r}{nearest(name, known)}" for name, value in unknown.items()]
            raise ConfigError(f"{config_class.__name__} has no such fields:{listing(lines)}")
        config = config_class(**{name: value for name, value in content.items() if name in known})
        config.__dict__["from_file"] = True
        return config


@dataclass(kw_only=True)
class LayerConfig(Config):
    """Fields of the methods that adapt modules of the model."""

    target_modules: str | list[str] | None = None
    """Names or name endings of the modules to adapt. A string is "all-linear" or a regular expression that must match
    the whole path. None chooses modules by the architecture."""
    exclude_modules: str | list[str] | None = None
    """Modules to exclude, given in the same way."""
    layers_to_transform: int | list[int] | None = None
    """Indices of the layers to adapt; None: all."""
    layers_pattern: str | list[str] | None = None
    """The name of the list of layers ("layers", "h"), for paths that contain more than one index."""
    bias: str = "none"
    """Biases to train: "none", "all", or "<method>_only" for the biases of the adapted modules."""
    fan_in_fan_out: bool = False
    """Whether the targets store their weights as (in, out), as in GPT-2. Set automatically, and only for PEFT."""

    default_roles: ClassVar[tuple[str, ...]] = ("attention.q", "attention.v", "attention.qkv")
    """Roles of the modules to adapt if `target_modules` is None; see `targets.roles`."""
    subsets: ClassVar[tuple[str, ...]] = ()
    """Names of fields that select some of the targets. Each of their entries must match a target."""
    patterns: ClassVar[tuple[str, ...]] = ()
    """Names of fields like `rank_pattern`, which map targets to values. Each of their keys must match a target."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple, frozenset)):
                setattr(self, name, sorted(value))
        super().__post_init__()
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern has no effect without layers_to_transform; give both or neither")
        own = self.bias.lower().removesuffix("_only")  # PEFT abbreviates some names, in upper or lower case
        names = [name.lower() for name in (self.peft_type, *self.aliases)]
        is_own = self.bias.endswith("_only") and len(own) >= 3 and any(own in name for name in names)
        if self.bias not in ("none", "all") and not is_own:
            raise ConfigError(f'bias must be "none", "all" or "{self.peft_type.lower()}_only", not {self.bias!r}')
        for name in ("target_modules", "exclude_modules", "layers_pattern", *self.subsets):
            if isinstance(getattr(self, name), str):
                pattern(getattr(self, name), name)
        for name in self.patterns:
            for key in getattr(self, name) or ():
                pattern(key, name)
        for entry in self.layers_pattern if isinstance(self.layers_pattern, list) else ():
            pattern(entry, "layers_pattern")

    def fill_targets(self, model: nn.Module) -> None:
        """Choose `target_modules` for a model if the user gave none."""
        from ..targets.roles import default_targets

        self.target_modules = default_targets(model, self.default_roles)

    def bare_parameters(self) -> Sequence[str]:
        """Name endings of bare parameters to adapt: parameters that are not the weight of a module of their own."""
        return ()

    def choose(self, paths: list[str]) -> list[str]:
        """Select the modules to adapt from the paths that the targeting fields match; by default all of them."""
        return paths


@dataclass(kw_only=True)
class PromptConfig(Config):
    """Fields of the methods that learn embeddings or cache entries in front of the input."""

    num_virtual_tokens: int | None = None
    """The number of learned positions."""
    token_dim: int | None = None
    """The width of an embedding; None: read from the model."""
    num_transformer_submodules: int | None = None
    """1, or 2 for an encoder-decoder; None: read from the model."""
    num_attention_heads: int | None = None
    """The number of attention heads in a cache entry; None: read from the model."""
    num_layers: int | None = None
    """The number of layers; None: read from the model."""

    prompt: ClassVar[type[Prompt]]
    changes_call = True
    example = {"num_virtual_tokens": 20}
    fills_cache: ClassVar[bool] = False
    """Whether the method learns keys and values for the cache, not embeddings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_virtual_tokens is None:
            raise ConfigError("num_virtual_tokens is missing; give the number of positions to learn")
        check_range(self, 1, math.inf, "num_virtual_tokens")

    def refuse_cacheless(self, model: str) -> None:
        """Raise ConfigError: the method needs a cache, and the model has none."""
        advice = "use a method that learns embeddings, or a model that generates"
        raise ConfigError(f"{self.peft_type} puts keys and values in the cache, which {model} does not have; {advice}")

    def build_prompt(self, spec: Spec, words: Tensor) -> Prompt:
        return self.prompt(self, spec, words)


COMMON = {f.name for f in (*fields(LayerConfig), *fields(PromptConfig))}
"""Names of the fields that are not specific to one method."""
MODEL_NAMES = ("base_model_name_or_path", "tokenizer_name_or_path")
"""Names of the fields that name a model: a hub id, a name that `veneer pull` knows, or a directory."""
ALWAYS_WRITTEN = {
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "target_modules"),
    *(f.name for f in fields(PromptConfig) if f.name.startswith("num_") or f.name == "token_dim"),
}


def at(path: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """The value for the module at `path` in a mapping from name endings or regular expressions, like `rank_pattern`.

    The first key that matches counts; `default` if none does.
    """
    for key, value in (patterns or {}).items():
        if fits(rf"(.*\.)?({key})", path, "a pattern"):
            return value
    return default


def check_range(config: Any, low: float, below: float, *names: str) -> None:
    """Raise ConfigError unless low <= value < below for each field; in a dict, for each of its values."""
    limit = f" and below {below:g}" if below < math.inf else ""
    for name in names:
        given = getattr(config, name)
        for value in given.values() if isinstance(given, dict) else () if given is None else (given,):
            if not low <= value < below:
                raise ConfigError(f"{name} must be at least {low:g}{limit}, not {value}")


def check_choice(config: Config, choices: Collection[str], *names: str) -> None:
    """Raise ConfigError unless each field is one of `choices` or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}{nearest(value, choices)}")


def mapping() -> Any:
    """A dataclass field for a dict. It defaults to {}, because other libraries do not accept null in its place."""
    return field(default_factory=dict)


def _called(kind: str) -> type[Config] | None:
    """The config class for the `peft_type` of a file, which may be an older name; None if there is none."""
    config_class = all_methods().get(kind.lower())
    if config_class is not None and config_class.peft_type == kind:
        return config_class
    return next((config for config in METHODS.values() if kind in config.aliases), None)


def default_of(f: Any) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return list(value) if isinstance(value, tuple) else value
