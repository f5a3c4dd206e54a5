"""Where PEFT's names stand: what `names.json` lists, which `python -m tests.peft_names --write` makes from a PEFT."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Place(NamedTuple):
    """A name in a module of PEFT."""

    module: str
    name: str
    home: str
    """The module that defines it."""


@functools.cache
def _listed() -> dict[str, dict[str, str]]:
    return json.loads(Path(__file__).with_suffix(".json").read_text())


def modules() -> list[str]:
    """Every module of PEFT, packages before what they contain."""
    return sorted(_listed()["modules"])


def places() -> Iterator[Place]:
    """Every name of every module."""
    for module, words in _listed()["modules"].items():
        for word in words.split():
            home, _, name = word.rpartition(":")
            yield Place(module, name, home or module)


def kind_of(home: str, name: str) -> str:
    """ "class", "function" or "value"."""
    return _listed()["kinds"][f"{home}.{name}"]


@functools.cache
def constructor(home: str, name: str) -> inspect.Signature | None:
    """The parameters with which a class is called; None if the list has none."""
    package = ".".join(home.split(".")[:3])
    for path, text in _listed()["constructors"].items():
        if path == f"{home}.{name}" or (path.startswith(f"{package}.") and path.endswith(f".{name}")):
            return signature(text)
    return None


def signature(text: str) -> inspect.Signature:
    """Parameters that are written as in Python's source; `...` stands for a default that a function makes."""
    function: Any = ast.parse(f"lambda {text}: 0", mode="eval").body
    arguments: ast.arguments = function.args
    parameters = []
    required = len(arguments.args) - len(arguments.defaults)
    for i, argument in enumerate(arguments.args):
        default = inspect.Parameter.empty if i < required else ast.literal_eval(arguments.defaults[i - required])
        if default is ...:
            default = dataclasses._HAS_DEFAULT_FACTORY  # type: ignore[attr-defined]
        parameters.append(inspect.Parameter(argument.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default))
    if arguments.vararg is not None:
        parameters.append(inspect.Parameter(arguments.vararg.arg, inspect.Parameter.VAR_POSITIONAL))
    for argument, given in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        default = inspect.Parameter.empty if given is None else ast.literal_eval(given)
        parameters.append(inspect.Parameter(argument.arg, inspect.Parameter.KEYWORD_ONLY, default=default))
    if arguments.kwarg is not None:
        parameters.append(inspect.Parameter(arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)
