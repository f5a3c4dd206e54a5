"""The catalogue of methods: a page for each, built from its source file, and parameter counts on a model."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

from ..core.adapter import Adapter, LowRank
from ..core.config import COMMON, Config, all_methods, default_of
from ..errors import ConfigError, VeneerError, nearest

PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}|doi:\S+[\w)]|OpenReview:\w+")

OTHER_NAMES = {
    "qlora": "QLoRA is lora on a base model whose weights are quantised to 4 bits: use lora with such a model",
    "rslora": "rsLoRA is lora with the setting use_rslora=true",
    "pissa": "PiSSA is lora with the setting init_lora_weights=pissa",
    "olora": "OLoRA is lora with the setting init_lora_weights=olora",
    "prefix": "it is called prefix_tuning",
    "ptuning": "it is called p_tuning",
    "p_tuning_v2": "P-tuning v2 is prefix_tuning",
    "ptuning_v2": "P-tuning v2 is prefix_tuning",
    "prompt": "it is called prompt_tuning",
    "soft_prompt": "it is called prompt_tuning",
    "adapter": "bottleneck adapters are called seq_bn (after each block) and par_bn (beside it)",
    "full": "training all weights is not parameter-efficient fine-tuning; `veneer methods` lists the methods",
}
"""Names of methods elsewhere that are settings of a method, or another name, here."""


@dataclass(frozen=True)
class Field:
    """A config field that belongs to one method."""

    name: str
    default: Any
    about: str


@dataclass(frozen=True)
class Page:
    """The description of a method."""

    name: str
    config: str
    claim: str
    formula: str
    paper: str
    text: str
    """The whole module docstring."""
    mergeable: bool
    low_rank: bool
    kinds: tuple[str, ...]
    """Kinds of modules that the method adapts: linear, conv, embedding, norm, block; or prompt."""
    learning_rate: float
    recommended: dict[str, Any]
    """Settings that `veneer train` uses by default."""
    fields: tuple[Field, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def pages() -> dict[str, Page]:
    """The page of every method, by name."""
    return {name: _page(name) for name in sorted(all_methods())}


def page_of(config: Config) -> Page:
    """The page of a config's method."""
    config_name = type(config).__name__
    return next(page for page in pages().values() if page.config == config_name)


def page(name: str) -> Page:
    """The page of one method.

    Raises:
        ConfigError: there is no such method.
    """
    known = all_methods()
    plain = name.lower().replace("-", "_")
    if plain in OTHER_NAMES:
        raise ConfigError(f"there is no method {name!r}; {OTHER_NAMES[plain]}")
    if plain not in known:
        raise ConfigError(f"there is no method {name!r}{nearest(name.lower(), known)}; `veneer methods` lists all")
    return _page(plain)


def config_for(name: str, **settings: Any) -> Config:
    """A method's config with its recommended settings, `settings`, and example values for other required settings."""
    config_class = all_methods()[page(name).name]
    combined = {**config_class.example, **config_class.recommended, **settings}
    return config_class(**combined)


def trainable(name: str, model: Any, **settings: Any) -> int | None:
    """Number of parameters that a method trains on a model; None if the method needs further settings or real weights.

    The model is left unchanged.
    """
    from .peft_model import get_peft_model

    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        config = config_for(name, **settings)
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
        count, _ = adapted.get_nb_trainable_parameters()
        adapted.unload()
    except (VeneerError, NotImplementedError):  # torch raises the second if a method reads values on meta
        return None
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return count


@cache
def _page(name: str) -> Page:
    config = all_methods()[name]
    docstring = sys.modules[config.__module__].__doc__
    text = inspect.cleandoc(docstring or "")
    claim, _, rest = text.partition("\n\n")
    paper = PAPER.search(text)
    adapter: type[Adapter] | None = getattr(config, "adapter", None)
    kinds = ["prompt"] if adapter is None else sorted(adapter.kinds)
    return Page(
        name=name,
        config=config.__name__,
        claim=" ".join(claim.split()),
        formula=_first_formula(rest),
        paper=paper.group() if paper else "",
        text=text,
        mergeable=adapter is not None and adapter.has_fold,
        low_rank=adapter is not None and issubclass(adapter, LowRank),
        kinds=tuple(kinds),
        learning_rate=config.learning_rate,
        recommended=dict(config.recommended),
        fields=tuple(_fields(config)),
    )


def _first_formula(text: str) -> str:
    """The first block of indented lines, dedented."""
    block = re.search(r"^ {4}\S.*(?:\n {4,}.*)*", text, re.MULTILINE)
    if block is None:
        return ""
    return inspect.cleandoc("\n" + block.group())


def _fields(config: type[Config]) -> list[Field]:
    docs = _field_docs(config)
    own_fields = [f for f in fields(config) if f.name not in COMMON]
    return [Field(f.name, default_of(f), docs.get(f.name, "")) for f in own_fields]


def _field_docs(config: type[Config]) -> dict[str, str]:
    """The string below each field in the source of a config and its base classes."""
    docs: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if not cls.__module__.startswith("veneer."):
            continue
        source = ast.parse(inspect.getsource(cls))
        body = source.body[0].body  # type: ignore[attr-defined]
        for field, after in zip(body, body[1:], strict=False):
            is_field = isinstance(field, ast.AnnAssign)
            if is_field and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                doc = str(after.value.value)
                docs[field.target.id] = " ".join(doc.split())
    return docs
