"""Where each token and each prompt of a model call is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import VeneerError
from ..maths.positions import prompts
from .cache import is_filled, length, of_call
from .calls import is_causal, tokens_of


def prompts_of(model: Any, kwargs: dict[str, Any], lengths: Any = None) -> Tensor | None:
    """Where the prompts of a model call are, as `maths.positions.prompts` says it; nowhere if a cache goes before.

    None for a call without tokens. Only the labels of a causal model end a prompt: those of others are not its tokens.
    """
    tokens = tokens_of(kwargs)
    if tokens is None:
        return None
    shape = tokens.shape[:2]
    if is_filled(of_call(kwargs)):
        return torch.zeros(shape[0], 2, dtype=torch.long, device=tokens.device)
    fitting = {n: t for n, t in kwargs.items() if n in ("attention_mask", "labels") and getattr(t, "shape", 0) == shape}
    mask = fitting.get("attention_mask", torch.ones(shape, device=tokens.device))
    known = None if lengths is None else torch.as_tensor(lengths, device=tokens.device)
    return prompts(mask, fitting.get("labels") if is_causal(model) else None, known)


def places_of(kwargs: dict[str, Any]) -> Tensor | None:
    """(rows, length): each token's index in its row, padding in front not counted, what is in the cache counted.

    None for a call without tokens.

    Raises:
        VeneerError: the cache does not count tokens, and there is no mask to count them by.
    """
    tokens = tokens_of(kwargs)
    if tokens is None:
        return None
    rows, n = tokens.shape[:2]
    mask = kwargs.get("attention_mask")
    is_mask = isinstance(mask, Tensor) and mask.dim() == 2
    past = length(of_call(kwargs))
    if past is None and not is_mask:
        raise VeneerError(
            "the model's cache does not count its tokens, so the call needs an attention_mask of (rows, all tokens)"
        )
    past = mask.shape[1] - n if past is None else past
    start = (mask != 0).long().argmax(1, keepdim=True) if is_mask and mask.shape == (rows, past + n) else 0
    return (past + torch.arange(n, device=tokens.device)).expand(rows, n) - start
