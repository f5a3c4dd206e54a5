"""The fast paths of an adapted model: `forward`s of single modules, and what is exchanged for one training call.

`core/hooks.py` calls `fit` at the start of a call of the model, `begin` when its arguments are final, and `end` after
it, whether it failed or not. The `forward` of a norm or an MLP is put on the instance by the first training call and
stays: outside of training it is the class's own. Taking the last adapter off takes all of it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

MARK = "_veneer_fast"


class Adapters(Protocol):
    """What the fast paths need to know of the adapters on a model."""

    def are_by_token(self) -> bool:
        """Whether each of them treats every token by itself, in the call under way."""


def begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapters: Adapters) -> None:
    """Exchange what a training call can do without; `end` undoes it."""
    from . import cross_entropy, padding

    if not torch.compiler.is_compiling():
        padding.lend(model, args, kwargs, adapters)
        cross_entropy.lend(model, kwargs)


def end(model: nn.Module) -> None:
    """Give back what `begin` exchanged."""
    from . import cross_entropy, padding

    if not torch.compiler.is_compiling():
        padding.take_back(model)
        cross_entropy.take_back(model)


def fit(model: nn.Module) -> None:
    """Bring the fast paths of modules in, once."""
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
