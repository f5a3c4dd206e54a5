"""Puts the fast paths into an adapted model: the root hooks of the loss, and `forward`s of single modules.

A module's `forward` is put on the instance by the first training call and stays; it is the class's own outside of
training, so only training is another. Taking the last adapter off takes all of it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from ._conditions import takes_part

MARK = "_veneer_fast"


def install(model: nn.Module) -> list[Any]:
    """The root hooks that bring the fast paths in."""
    from . import cross_entropy, padding

    first = model.register_forward_pre_hook(_before, prepend=True)  # other hooks run modules that are checkpointed
    return [first, *padding.install(model), *cross_entropy.install(model)]


def _before(model: nn.Module, args: Any) -> None:
    if takes_part(model):
        fit(model)


def fit(model: nn.Module) -> None:
    """Bring the fast paths of modules in, as the first training call does."""
    if MARK not in model.__dict__:
        model.__dict__[MARK] = True
        for module, forward in _fitting(model):
            module.__dict__["forward"] = partial(forward, module)


def uninstall(model: nn.Module) -> None:
    """Give every module its own `forward` back."""
    from . import padding

    model.__dict__.pop(padding.SEEN, None)
    if model.__dict__.pop(MARK, None):
        for module in model.modules():
            own = module.__dict__.get("forward")
            if isinstance(own, partial) and own.func in _forwards():
                del module.__dict__["forward"]


def _forwards() -> tuple[Any, ...]:
    from . import gated_mlp, norm

    return norm.forward, gated_mlp.forward, gated_mlp.activate


def _fitting(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Modules that a fast path knows, and their new `forward`."""
    from . import gated_mlp, norm

    for module in model.modules():
        if "forward" in module.__dict__:  # somebody else's
            continue
        if norm.recognised(module):
            yield module, norm.forward
        elif gated_mlp.recognised(module):
            yield module, gated_mlp.forward
        elif gated_mlp.is_written_out(module):
            yield module, gated_mlp.activate
