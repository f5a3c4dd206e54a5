"""Calls of a transformers model: argument names, input tokens, and whether it is an encoder-decoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
OF_PAIRS = ("perm_mask", "target_mapping")
"""Arguments of XLNet that say which positions see which others."""


def parameters(model: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a model's `forward`, in order, without `*args` and `**kwargs`.

    Decorators (transformers' renaming of arguments from 5.24 on, accelerate's hooks) keep the original signature. A
    `forward` that was set on the instance takes precedence over that of the class.
    """
    own = model.__dict__.get("forward")
    return _parameters(type(model).forward)[1:] if own is None else _parameters(own)


@cache
def _parameters(function: Any) -> tuple[str, ...]:
    try:
        arguments = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return ()
    return tuple(argument.name for argument in arguments if argument.kind not in COLLECTING)


def tokens_of(kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input of a call: ids (rows, length) or embeddings (rows, length, width); None if there is neither."""
    return next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)


def is_causal(model: Any) -> bool:
    """Whether a model generates text and has no separate encoder."""
    generates = hasattr(model, "can_generate") and model.can_generate()
    return generates and not is_encoder_decoder(model)


def is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def encoder_of(model: Any) -> nn.Module | None:
    """The encoder of an encoder-decoder model; None for other models."""
    if not is_encoder_decoder(model):
        return None
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    return encoder if encoder is not model else None
