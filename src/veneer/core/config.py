"""Configs: the fields of a method, in Hugging Face PEFT's names and file format, and what a method tells the core.

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
    """A string that is its own `.value`, as the members of an enum of strings are."""

    @property
    def value(self) -> str:
        return str(self)


class TaskType(str, enum.Enum):
    """What the model is trained for; decides which head is trained and saved with the adapter."""

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
"""Modules that a task trains and saves besides the adapter, where the model has them."""

METHODS: dict[str, type[Config]] = {}
"""Every config class by method name, which is its file's name. Filled by `all_methods()`."""


def all_methods() -> dict[str, type[Config]]:
    """Every method veneer has, by name (importing their files)."""
    from .. import methods as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return METHODS


@dataclass(kw_only=True)
class Config(Checked):
    """What every method has. Subclasses set `peft_type` and `adapter` and add their fields."""

    task_type: TaskType | str | None = None
    """One of the six task types, or None for a model that is none of them."""
    base_model_name_or_path: str | None = None
    """Where the base model came from; filled in when an adapter is attached."""
    revision: str | None = None
    """The revision of the base model on the hub."""
    inference_mode: bool = False
    """The adapter is frozen; true in every saved file."""
    modules_to_save: list[str] | None = None
    """Modules of which a whole copy is trained and saved with the adapter (a new head, resized embeddings)."""

    peft_type: ClassVar[Name]
    adapter: ClassVar[type[Adapter]]
    aliases: ClassVar[tuple[str, ...]] = ()
    """What older files call the method (their `peft_type`)."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Today's names of the adapter's attributes, by what older files call them."""
    facts: ClassVar[tuple[str, ...]] = ()
    """Keyword arguments of a model call (and of `generate`) that belong to the adapter."""
    generate_with: ClassVar[Mapping[str, Any]] = {}
    """Settings that `generate` must run with."""
    reads_encoder: ClassVar[bool] = False
    """`before` is also given the encoder's own call, which `generate` makes past the model's."""
    foreign: ClassVar[Mapping[str, Any]] = {}
    """The reference's defaults, other than null and false, for fields we do not have."""
    from_file: ClassVar[bool] = False
    """Set on a config that was read from a file, whose tensors and notes on the base model follow."""
    file_holds_embedding: ClassVar[bool] = True
    """PEFT's files carry the base embedding beside an adapter that targets it by name."""
    learning_rate: ClassVar[float] = 1e-3
    """Where training starts well when the user names none."""
    recommended: ClassVar[Mapping[str, Any]] = {}
    """Settings to train with when the user names none, where the defaults of PEFT's files learn little."""
    example: ClassVar[Mapping[str, Any]] = {}
    """Settings it cannot do without, as an example of them."""

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

    # What a method may tell the core

    def semantic_fields(self) -> list[str]:
        """The fields that say what its tensors mean: the method's own, and of which modules it holds a copy."""
        return [f.name for f in fields(self) if f.name not in COMMON - {"modules_to_save"} and "dropout" not in f.name]

    def members(self) -> Sequence[Config]:
        """The configs of the methods under this name: itself, unless it unites several."""
        return (self,)

    def reshape(self, model: nn.Module) -> Any:
        """Change the model's layers before adapters go on. An object with `.undo()`, or None if nothing changed."""
        return None

    def ties(self) -> bool:
        """A trained copy of a module also runs where the module's weight is tied."""
        return False

    def join(self, adapter: Adapter) -> Adapter:
        """What a union makes of the adapter that a member has built."""
        return adapter

    def build(self, target: Target, shared: nn.Module | None = None, **kwargs: Any) -> Adapter:
        """The adapter for one target."""
        return self.adapter(self, target, shared, **kwargs)

    def build_shared(self, targets: Sequence[Target]) -> nn.Module | None:
        """One module for all layers of an adapter name (projections, banks, gates)."""
        return None

    def before(self, shared: nn.Module | None, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        """Compute facts once for a model call and put them into `facts`, under `shared` if they are this adapter's."""

    def after(self, facts: dict[Any, Any], output: Any) -> None:
        """Look at what a model call gave (leave a note on its cache, for the calls that go on from it)."""

    def loss(self, adapters: Sequence[Adapter]) -> Tensor | None:
        """A term added to the model's loss."""
        return None

    def schedule(self, parts: Mapping[str, Any]) -> Any:
        """An object with `.step(n)`, called after the n-th optimizer step, or None.

        Args:
            parts: the adapters by path, or a prompt under "".
        """
        return None

    # The file

    def saved(self) -> Config:
        """The config that goes to the file, as an adapter's `export` is for tensors."""
        return copy.copy(self)

    def to_dict(self) -> dict[str, Any]:
        """The file's content: the method's own fields, and of the common ones those that say something."""
        own = {"peft_type": str(self.peft_type)}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in COMMON or f.name in ALWAYS_WRITTEN or value != default_of(f):
                own[f.name] = _plain(value)
        return dict(sorted(own.items()))

    def save_pretrained(self, directory: str | Path, name: str = CONFIG_NAME) -> None:
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(directory) / name, text.encode())

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub: Any) -> Config:
        """Read `adapter_config.json` of a directory or a hub id."""
        return cls.from_dict(read_json(find_file(source, CONFIG_NAME, **hub)))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Config:
        """The config of any method from a file's content. Unknown fields that say something are an error."""
        kind = str(content.get("peft_type", ""))
        found = _called(kind)
        if found is None:
            types = [str(config.peft_type) for config in METHODS.values()]
            raise ConfigError(f"peft_type {kind!r} is not a method of veneer{nearest(kind.upper(), types)}")
        known = {f.name for f in fields(found)}
        harmless = {"peft_type", "auto_mapping", "peft_version"}
        unknown = {
            name: value
            for name, value in content.items()
            if name not in known | harmless and value not in (None, False, "", [], {}, found.foreign.get(name))
        }
        if unknown:
            lines = [f"{name} = {value!r}{nearest(name, known)}" for name, value in unknown.items()]
            raise ConfigError(f"{found.__name__} has no such fields:{listing(lines)}")
        config = found(**{name: value for name, value in content.items() if name in known})
        config.__dict__["from_file"] = True
        return config


@dataclass(kw_only=True)
class LayerConfig(Config):
    """Fields of every method that adapts modules of the model."""

    target_modules: str | list[str] | None = None
    """Names or name endings of the modules to adapt; a string is a regular expression for the whole path, or
    "all-linear". None: the right ones for the architecture."""
    exclude_modules: str | list[str] | None = None
    """The same, for modules to leave alone."""
    layers_to_transform: int | list[int] | None = None
    """Indices of the layers to adapt; None: all."""
    layers_pattern: str | list[str] | None = None
    """The name of the list of layers ("layers", "h"), where a path holds more than one index."""
    bias: str = "none"
    """Biases to train: "none", "all", or "<method>_only" for those of the adapted modules."""
    fan_in_fan_out: bool = False
    """The targets store their weights as (in, out), as GPT-2 does. Read off the modules; kept for the file."""

    default_roles: ClassVar[tuple[str, ...]] = ("attention.q", "attention.v", "attention.qkv")
    """What to adapt when `target_modules` is None, as roles of the architecture's structure."""
    subsets: ClassVar[tuple[str, ...]] = ()
    """Fields that name some of the targets, each entry of which must match one."""
    patterns: ClassVar[tuple[str, ...]] = ()
    """Fields like `rank_pattern`, each key of which must match a target."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple, frozenset)):
                setattr(self, name, sorted(value))
        super().__post_init__()
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern says where the layer index stands; it needs layers_to_transform")
        own = self.bias.lower().removesuffix("_only")  # PEFT writes a part of some methods' names, in any case
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
        """Choose `target_modules` for a model when the user gave none."""
        from ..targets.roles import default_targets

        self.target_modules = default_targets(model, self.default_roles)

    def bare_parameters(self) -> Sequence[str]:
        """Parameters to adapt that are no module's weight, by name ending."""
        return ()

    def choose(self, paths: list[str]) -> list[str]:
        """Which of the modules that the targeting fields match are adapted; all of them, unless the method counts."""
        return paths


@dataclass(kw_only=True)
class PromptConfig(Config):
    """Fields of every method that learns tokens or cache entries in front of the input."""

    num_virtual_tokens: int | None = None
    """How many positions are learned."""
    token_dim: int | None = None
    """Width of an embedding; None: the model's."""
    num_transformer_submodules: int | None = None
    """1, or 2 for an encoder-decoder; None: by the model."""
    num_attention_heads: int | None = None
    """Attention heads of a cache entry; None: the model's."""
    num_layers: int | None = None
    """Layers of the model; None: the model's."""

    prompt: ClassVar[type[Prompt]]
    example = {"num_virtual_tokens": 20}
    fills_cache: ClassVar[bool] = False
    """It learns keys and values, not embeddings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_virtual_tokens is None:
            raise ConfigError("num_virtual_tokens must say how many positions to learn")
        check_range(self, 1, math.inf, "num_virtual_tokens")

    def refuse_cacheless(self, model: str) -> None:
        """Raise for a model without a cache, where the prompt goes into that."""
        advice = "use a method that learns embeddings, or a model that generates"
        raise ConfigError(f"{self.peft_type} puts keys and values in the cache, which {model} does not have; {advice}")

    def build_prompt(self, spec: Spec, words: Tensor) -> Prompt:
        return self.prompt(self, spec, words)


COMMON = {f.name for f in (*fields(LayerConfig), *fields(PromptConfig))}
"""Fields that are not a method's own."""
ALWAYS_WRITTEN = {
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "target_modules"),
    *(f.name for f in fields(PromptConfig) if f.name.startswith("num_") or f.name == "token_dim"),
}


def at(path: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """The value a `rank_pattern`-like mapping gives a module: its keys are name endings or regular expressions."""
    for key, value in (patterns or {}).items():
        if fits(rf"(.*\.)?({key})", path, "a pattern"):
            return value
    return default


def check_range(config: Any, low: float, below: float, *names: str) -> None:
    """Raise ConfigError unless low <= field < below; of a `rank_pattern`-like mapping, each value."""
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
    """A dict field. Its empty value is {}, never null, which other readers do not take."""
    return field(default_factory=dict)


def _called(kind: str) -> type[Config] | None:
    """The method of a file's `peft_type`, also by a name it had once."""
    found = all_methods().get(kind.lower())
    if found is not None and found.peft_type == kind:
        return found
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
