"""A padded batch goes through the layers without its padding: its rows end to end, with attention by sequence.

    h[kept] = body(ids[kept]),  kept: the places that the attention mask names;  h is zero at the others

For the length of a training call the body of a causal language model is lent a `forward` that leaves padding out and
puts it back into the hidden states, so that the head, the loss and whoever reads `outputs.logits` see the shapes they
know; logits at padding, from which nothing is learned, are others than they would be. Done where rows are padded on the
right and the model was seen to keep sequences in one row apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..upstream import cache as caches
from ..upstream import checkpointing
from ..upstream.calls import is_encoder_decoder, parameters
from . import is_fast
from ._conditions import takes_part
from ._patch import Adapters
from .attention import by_sequence, is_replaceable

KNOWN = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache"}
KNOWN |= {"num_items_in_batch", "return_dict"}
"""What a body may be given, beside switches that are off; Trainer's count of items is for the loss, and comes along."""
SEEN = "_veneer_keeps_apart"


def lend(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], adapters: Adapters) -> None:
    """Leave padding out of the layers for the length of a training call."""
    learns = kwargs.get("labels") is not None and takes_part(model)
    if args or not learns or not is_fast("padding") or not is_fast("attention"):
        return
    kept = kept_places(kwargs.get("attention_mask"), kwargs["labels"])
    body = getattr(model, "base_model", model)
    if kept is None or body is model or "forward" in body.__dict__ or not _is_fit(model, adapters):
        return
    own = body.forward
    names = parameters(body)

    def forward(*args: Any, **kwargs: Any) -> Any:
        body.__dict__.pop("forward", None)
        given = without_padding({**dict(zip(names, args, strict=False)), **kwargs}, kept)
        if given is None:
            return own(*args, **kwargs)
        with by_sequence(model):
            out = own(**given)
        out.last_hidden_state = with_padding(out.last_hidden_state, kept)
        return out

    body.__dict__["forward"] = forward
    model.__dict__["_veneer_lent_body"] = body


def take_back(model: Any) -> None:
    body = model.__dict__.pop("_veneer_lent_body", None)
    if body is not None:
        body.__dict__.pop("forward", None)


def kept_places(mask: Any, labels: Tensor) -> Tensor | None:
    """Whether each place of (rows, length) is kept; None where rows are not padded on the right, or learn at padding.

    Nor where there is no padding: nothing is gained then.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != labels.shape or mask.is_meta:
        return None
    kept = mask.bool()
    is_right = kept[:, 0].all() and not (kept[:, 1:] & ~kept[:, :-1]).any()
    learned = labels[:, 1:][~kept[:, :-1]] != -100  # what is predicted from padding
    return kept if bool(is_right and not learned.any()) and not bool(kept.all()) else None


def without_padding(kwargs: dict[str, Any], kept: Tensor) -> dict[str, Any] | None:
    """The keyword arguments of a body with all rows in one; None where they hold anything that is not known here."""
    known = {name for name, value in kwargs.items() if value is not None and value is not False}
    ids, places = kwargs.get("input_ids"), kwargs.get("position_ids")
    if known - KNOWN or caches.of_call(kwargs) is not None or ids is None or ids.shape != kept.shape:
        return None
    if kwargs.get("inputs_embeds") is not None or (places is not None and places.shape != kept.shape):
        return None
    count = torch.arange(kept.shape[1], device=ids.device).expand_as(ids) if places is None else places
    row = {"input_ids": ids[kept][None], "position_ids": count[kept][None], "attention_mask": None}
    return {**kwargs, **row, "use_cache": False}


def with_padding(hidden: Tensor, kept: Tensor) -> Tensor:
    """(rows, length, width) of hidden states (1, kept, width), zero at padding."""
    whole = hidden.new_zeros(kept.numel(), hidden.shape[-1])
    return whole.index_copy(0, kept.flatten().nonzero().squeeze(1), hidden[0]).view(*kept.shape, -1)


def _is_fit(model: Any, adapters: Adapters) -> bool:
    """Whether nothing in the model or its adapters looks past its own token but attention, which is seen by trying."""
    config = model.config
    checkpoints = checkpointing.is_on(model)
    routes = getattr(config, "output_router_logits", False)
    if checkpoints or routes or is_encoder_decoder(model) or not is_replaceable(model):
        return False
    if not adapters.are_by_token() or any(_is_special(module) for module in model.modules()):
        return False
    if SEEN not in model.__dict__:
        model.__dict__[SEEN] = _keeps_apart(model, model.base_model)
    return bool(model.__dict__[SEEN])


def _is_special(module: nn.Module) -> bool:
    """The module's weights are sharded over processes, which come together for calls of the whole model alone, or
    quantised, which libraries may lay out anew for a call without gradients, as the trial is one."""
    shards = any(kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in type(module).__mro__)
    own = module._parameters.values()
    return shards or any(p is not None and (type(p) is not nn.Parameter or hasattr(p, "ds_id")) for p in own)


@torch.no_grad()
def _keeps_apart(model: Any, body: Any) -> bool:
    """Whether a sequence gives the same behind another one as alone."""
    modes = {module: module.training for module in body.modules()}
    ids = torch.arange(14, device=model.device)[None] * 7 % model.config.get_text_config().vocab_size
    places = torch.cat([torch.arange(6), torch.arange(8)]).to(ids.device)[None]
    try:
        body.eval()
        with by_sequence(model):
            both = body(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state[:, 6:]
        alone = body(input_ids=ids[:, 6:], use_cache=False).last_hidden_state
        near = 1e-4 if alone.dtype == torch.float32 else 1e-2
        return torch.allclose(both, alone, rtol=near, atol=near * float(alone.abs().max()))
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError):  # it takes no such row
        return False
    finally:
        for module, mode in modes.items():
            module.training = mode
