"""The positions of the tokens and of the prompts in a model call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import VeneerError
from ..maths.positions import prompts
from .cache import is_filled, length, of_call
from .calls import is_causal, tokens_of


def prompts_of(model: Any, kwargs: dict[str, Any], lengths: Any = None) -> Tensor | None:
    """The start and end of each row's prompt (rows, 2), as in `maths.positions.prompts`; None without tokens.

    Prompts are empty in a call that continues from a cache. Labels mark the end of a prompt only in causal models.
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
    """Each token's position in its row (rows, length): left padding is not counted, tokens in the cache are.

    None for a call without tokens.

    Raises:
        VeneerError: the cache does not count its tokens, and there is no attention mask.
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
            "the model's cache does not count its tokens; pass an attention_mask of shape (rows, all tokens)"
        )
    past = mask.shape[1] - n if past is None else past
    start = (mask != 0).long().argmax(1, keepdim=True) if is_mask and mask.shape == (rows, past + n) else 0
    return (past + torch.arange(n, device=tokens.device)).expand(rows, n) - start
