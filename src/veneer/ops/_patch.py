"""Installing the fast paths on an adapted model.

Some fast paths replace the `forward` of a single module (norms, MLPs, activations). `fit` puts it on the instance at
the first training call; outside of training it calls the class's own `forward`. `uninstall` removes it together with
the last adapter.

Others replace the `forward` of the head or the body for one training call only: `core/hooks.py` calls `begin` when the
call's arguments are final, and `end` after the call, even if it failed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

MARK = "_veneer_fast"


class Adapters(Protocol):
    """What the fast paths need to know about the adapters on a model."""

    is_sharded: bool
    """Whether FSDP shards the model. It registers hooks on the model's outputs, which must then be true tensors."""

    def are_by_token(self) -> bool:
        """Whether each of them treats every token independently in the current call."""


def begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapters: Adapters) -> None:
    """Replace the `forward` of body and head for this training call; `end` undoes it."""
    from . import cross_entropy, padding

    if not torch.compiler.is_compiling() and not adapters.is_sharded:
        padding.replace_forward(model, args, kwargs, adapters)
        cross_entropy.replace_forward(model, kwargs)


def end(model: nn.Module) -> None:
    """Restore what `begin` replaced."""
    from . import cross_entropy, padding

    if not torch.compiler.is_compiling():
        padding.restore_forward(model)
        cross_entropy.restore_forward(model)


def fit(model: nn.Module) -> None:
    """Replace the `forward` of every module that has a fast one; does nothing after the first time."""
    if MARK in model.__dict__:
        return
    model.__dict__[MARK] = True
    for module in model.modules():
        is_free = "forward" not in module.__dict__  # otherwise another library has replaced it
        forward = _fast_forward(module) if is_free else None
        if forward is not None:
            module.__dict__["forward"] = partial(forward, module)


def uninstall(model: nn.Module) -> None:
    """Restore the `forward` of every module."""
    from . import gated_mlp, norm, padding

    model.__dict__.pop(padding.SEEN, None)
    was_installed = model.__dict__.pop(MARK, False)
    if not was_installed:
        return
    fast_forwards = (norm.forward, gated_mlp.forward, gated_mlp.activate)
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func in fast_forwards:
            del module.__dict__["forward"]


def _fast_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The function that replaces a module's `forward`, or None."""
    from . import gated_mlp, norm

    if norm.recognised(module):
        return norm.forward
    if gated_mlp.recognised(module):
        return gated_mlp.forward
    if gated_mlp.is_written_out(module):
        return gated_mlp.activate
    return None
