"""What there is to choose from: for every method its page, read off its file, and its size on a model."""

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

PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}|doi:\S+[\w)]|OpenReview(?: \w+)?")


@dataclass(frozen=True)
class Field:
    """One setting of a method's own."""

    name: str
    default: Any
    about: str


@dataclass(frozen=True)
class Page:
    """What a method is."""

    name: str
    config: str
    claim: str
    formula: str
    paper: str
    text: str
    """The whole page."""
    mergeable: bool
    low_rank: bool
    kinds: tuple[str, ...]
    """What it adapts: linear, conv, embedding, norm, block; or prompt."""
    learning_rate: float
    recommended: dict[str, Any]
    """Settings to train with when none are given."""
    fields: tuple[Field, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def pages() -> dict[str, Page]:
    """The page of every method, by name."""
    return {name: _page(name) for name in sorted(all_methods())}


def page(name: str) -> Page:
    """The page of one method.

    Raises:
        ConfigError: there is no such method.
    """
    known = all_methods()
    plain = name.lower().replace("-", "_")
    if plain not in known:
        raise ConfigError(f"there is no method {name!r}{nearest(name.lower(), known)}; `veneer methods` lists all")
    return _page(plain)


def config_for(name: str, **settings: Any) -> Config:
    """A method's config: its recommended settings, those given, and examples of what it cannot do without."""
    found = all_methods()[page(name).name]
    return found(**{**found.example, **found.recommended, **settings})


def trainable(name: str, model: Any, **settings: Any) -> int | None:
    """How many parameters a method trains on a model (left as it is); None where it needs settings of its own."""
    from .peft_model import get_peft_model

    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        adapted = get_peft_model(model, config_for(name, **settings), low_cpu_mem_usage=True)
        count = adapted.get_nb_trainable_parameters()[0]
        adapted.unload()
    except (VeneerError, NotImplementedError):  # the second is torch's, where a method looks at values on meta
        return None
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return count


@cache
def _page(name: str) -> Page:
    config = all_methods()[name]
    text = inspect.cleandoc(sys.modules[config.__module__].__doc__ or "")
    claim, _, rest = text.partition("\n\n")
    claim = " ".join(claim.split())
    formula = re.findall(r"^ {4}\S.*(?:\n {4,}.*)*", rest, re.MULTILINE)
    paper = PAPER.search(text)
    adapter: type[Adapter] | None = getattr(config, "adapter", None)
    return Page(
        name=name,
        config=config.__name__,
        claim=claim,
        formula=inspect.cleandoc("\n" + formula[0]) if formula else "",
        paper=paper.group() if paper else "",
        text=text,
        mergeable=adapter is not None and adapter.has_fold,
        low_rank=adapter is not None and issubclass(adapter, LowRank),
        kinds=("prompt",) if adapter is None else tuple(sorted(adapter.kinds)),
        learning_rate=config.learning_rate,
        recommended=dict(config.recommended),
        fields=tuple(_fields(config)),
    )


def _fields(config: type[Config]) -> list[Field]:
    about = _field_docs(config)
    return [Field(f.name, default_of(f), about.get(f.name, "")) for f in fields(config) if f.name not in COMMON]


def _field_docs(config: type[Config]) -> dict[str, str]:
    """The string below each field of a config and its method's bases."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if not cls.__module__.startswith("veneer."):
            continue
        body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
        for field, after in zip(body, body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[field.target.id] = " ".join(str(after.value.value).split())  # type: ignore[union-attr]
    return found
