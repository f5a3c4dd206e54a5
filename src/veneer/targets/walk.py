"""The modules of a model by path, as they are without adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .modules import Modules, WrapperModule


def bare(module: nn.Module) -> nn.Module:
    """The module of the base model inside any adapter layers around it."""
    while isinstance(module, WrapperModule):
        module = module.base_layer
    return module


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, module) for every module as the unadapted model would list them, skipping adapter layers."""
    seen: set[int] = set()
    todo: list[tuple[str, nn.Module]] = [(prefix, module)]
    while todo:
        path, module = todo.pop()
        module = bare(module)
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        children: list[tuple[str, nn.Module]] = []
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, Modules):
                child_path = f"{path}.{name}" if path else name
                children.append((child_path, child))
        todo += reversed(children)


def matches(path: str, entry: str) -> bool:
    """Whether `entry` is `path` or its ending: `self_attn.q_proj` matches `model.layers.0.self_attn.q_proj`."""
    return path == entry or path.endswith("." + entry)


def by_number(path: str) -> tuple[Any, ...]:
    """A key for sorting paths and tensor names: layer 2 comes before layer 10."""
    parts: list[Any] = re.split("([0-9]+)", path)
    for i in range(1, len(parts), 2):
        digits = parts[i].lstrip("0")
        parts[i] = (len(digits), digits)  # not int(): a hostile file can hold more digits than it accepts
    return (*parts, path)
