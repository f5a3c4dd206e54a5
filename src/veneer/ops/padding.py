"""Running a padded batch through the layers without its padding: as one row, with attention by sequence.

    h[is_token] = body(ids[is_token]),  is_token: True where the attention mask is 1;  h is zero elsewhere

During a training call, the `forward` of a causal language model's body removes padding from its inputs and puts it back
into the hidden states, so that the head, the loss and readers of `outputs.logits` see the usual shapes. Logits at
padding, which no loss is computed from, differ from those of the plain path. This is done only if rows are padded on
the right, if no hook sees the shape of their embeddings, and if a trial has shown that sequences in one row do not
affect each other in this model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..targets.modules import evaluating
from ..upstream import cache as caches
from ..upstream import checkpointing
from ..upstream.calls import is_encoder_decoder, parameters
from ..upstream.sharding import is_sharded
from . import is_fast
from ._conditions import takes_part
from ._patch import Adapters
from .attention import by_sequence, is_replaceable, keeps_apart

KNOWN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "inputs_embeds",
    "use_cache",
    "num_items_in_batch",
    "return_dict",
}
"""Arguments of a body that are supported, besides flags that are off; num_items_in_batch comes from Trainer."""
SEEN = "_veneer_keeps_apart"


def replace_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], adapters: Adapters) -> None:
    """Leave padding out of the layers in this training call."""
    is_supervised = kwargs.get("labels") is not None and takes_part(model)
    if args or not is_supervised or not is_fast("padding") or not is_fast("attention"):
        return
    is_token = kept_places(kwargs.get("attention_mask"), kwargs["labels"])
    body = getattr(model, "base_model", model)
    if is_token is None or body is model or "forward" in body.__dict__:
        return
    if not _is_suitable(model, adapters):
        return
    plain_forward = body.forward
    names = parameters(body)

    def forward(*args: Any, **kwargs: Any) -> Any:
        body.__dict__.pop("forward", None)
        named = dict(zip(names, args, strict=False))
        unpadded = without_padding(named | kwargs, is_token)
        if unpadded is None:
            return plain_forward(*args, **kwargs)
        with by_sequence(model):
            out = plain_forward(**unpadded)
        out.last_hidden_state = with_padding(out.last_hidden_state, is_token)
        return out

    body.__dict__["forward"] = forward
    model.__dict__["_veneer_lent_body"] = body


def restore_forward(model: Any) -> None:
    """Give the body its own `forward` back after the call."""
    body = model.__dict__.pop("_veneer_lent_body", None)
    if body is not None:
        body.__dict__.pop("forward", None)


# Removing and adding padding


def kept_places(mask: Any, labels: Tensor) -> Tensor | None:
    """The attention mask (rows, length) as booleans; None if padding cannot be left out, or there is none.

    It cannot be left out if rows are not padded on the right, or if a label is predicted from padding.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != labels.shape or mask.is_meta:
        return None
    is_token = mask.bool()
    before = is_token[:, :-1]
    after = is_token[:, 1:]
    has_gaps = (after & ~before).any()
    is_right_padded = is_token[:, 0].all() and not has_gaps
    if not is_right_padded or is_token.all():
        return None
    predicted_from_padding = labels[:, 1:][~before]
    if (predicted_from_padding != -100).any():
        return None
    return is_token


def without_padding(kwargs: dict[str, Any], is_token: Tensor) -> dict[str, Any] | None:
    """The keyword arguments of a body with all rows in one; None if an argument is not supported."""
    ids = kwargs.get("input_ids")
    positions = kwargs.get("position_ids")
    used = {name for name, value in kwargs.items() if value is not None and value is not False}
    if used - KNOWN or caches.of_call(kwargs) is not None or kwargs.get("inputs_embeds") is not None:
        return None
    if ids is None or ids.shape != is_token.shape:
        return None
    if positions is None:
        positions = torch.arange(is_token.shape[1], device=ids.device).expand_as(ids)
    elif positions.shape != is_token.shape:
        return None
    return {
        **kwargs,
        "input_ids": ids[is_token][None],
        "position_ids": positions[is_token][None],
        "attention_mask": None,
        "use_cache": False,
    }


def with_padding(hidden: Tensor, is_token: Tensor) -> Tensor:
    """Hidden states (1, tokens, width) as (rows, length, width), with zeros at padding."""
    flat = hidden.new_zeros(is_token.numel(), hidden.shape[-1])
    indices = is_token.flatten().nonzero().squeeze(1)
    return flat.index_copy(0, indices, hidden[0]).view(*is_token.shape, -1)


# Which models are suitable


def _is_suitable(model: Any, adapters: Adapters) -> bool:
    """Whether only attention mixes tokens, in the model and its adapters, and it can be computed by sequence."""
    if checkpointing.is_on(model) or is_encoder_decoder(model) or not is_replaceable(model):
        return False
    if getattr(model.config, "output_router_logits", False) or not adapters.are_by_token():
        return False
    if any(_is_special(module) for module in model.modules()) or _is_watched(model.get_input_embeddings()):
        return False
    if SEEN not in model.__dict__:
        model.__dict__[SEEN] = _keeps_apart(model)
    return bool(model.__dict__[SEEN])


def _is_special(module: nn.Module) -> bool:
    """Whether the module's weights are sharded or quantised, so that the trial must not call the body alone.

    Processes with sharded weights synchronise in calls of the whole model only, and libraries may change the layout of
    quantised weights in a call without gradients, such as the trial.
    """
    if is_sharded(module):
        return True
    for p in module._parameters.values():
        is_plain = p is None or (type(p) is nn.Parameter and not hasattr(p, "ds_id"))
        if not is_plain:
            return True
    return False


def _is_watched(embeddings: nn.Module) -> bool:
    """Whether a hook sees the shape of the embedded batch, as NEFTune's does: it scales noise by the length of rows."""
    return bool(embeddings._forward_hooks or embeddings._forward_pre_hooks)


def _keeps_apart(model: Any) -> bool:
    """Whether a sequence has the same hidden states alone and after another sequence in the same row."""
    body = model.base_model
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(14, device=model.device) * 7 % vocabulary

    def hidden_states(**inputs: Tensor) -> Tensor:
        return body(**inputs, use_cache=False).last_hidden_state

    try:
        with evaluating(body), by_sequence(model):
            return keeps_apart(hidden_states, ids[:6], ids[6:])
    except Exception:  # a model fails on such a row in its own way; the plain path is taken then
        return False
