"""The modules of a model by their paths, with adapters looked through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .modules import Modules, WrapperModule


def bare(module: nn.Module) -> nn.Module:
    """The module of the base model, without the adapters around it."""
    while isinstance(module, WrapperModule):
        module = module.base_layer
    return module


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, module) of every module as the unadapted model would list them, looking through adapter layers."""
    seen: set[int] = set()
    todo: list[tuple[str, nn.Module]] = [(prefix, module)]
    while todo:
        path, module = todo.pop()
        module = bare(module)
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        children = module._modules.items()
        found = [(f"{path}.{n}" if path else n, c) for n, c in children if c is not None and not isinstance(c, Modules)]
        todo += reversed(found)


def matches(path: str, entry: str) -> bool:
    """`entry` is the path or its ending: `q_proj` and `self_attn.q_proj` match `model.layers.0.self_attn.q_proj`."""
    return path == entry or path.endswith("." + entry)
