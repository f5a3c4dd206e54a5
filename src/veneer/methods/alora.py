"""aLoRA: LoRA that acts only from its invocation tokens on, so that earlier cache entries equal the base model's.

    y_t = W x_t + [t >= t0] s B A x_t,  t0 the start of the last occurrence of the invocation tokens in the row

Greenewald et al., 2025, arXiv:2504.12397. Trainable: as for LoRA. Not mergeable: before t0 the weight is W. Starts as a
no-op. A row without the invocation gets the base model's output. The invocation must lie within a single call of more
than one token. A call that continues from a cache remembers which rows were invoked; PEFT forgets them in a custom
generation loop. `alora_offsets`, an argument of a model call and of `generate`, gives the distance of t0 from the end
for each row, or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..errors import ConfigError, VeneerError
from ..upstream import cache as caches
from .families.variants import Composition
from .lora import LoRA, LoraConfig

Key = tuple[str, tuple[int, ...]]


class ALoRA(LoRA):
    kinds = frozenset({"linear"})
    fold = Adapter.fold

    @classmethod
    def check(cls, config: Any) -> None:
        if any(token < 0 for token in config.alora_invocation_tokens):
            raise ConfigError(f"alora_invocation_tokens must be token ids, not {config.alora_invocation_tokens}")
        if config.task_type == "SEQ_2_SEQ_LM":
            raise ConfigError("aLoRA acts from a position in one sequence on, but a SEQ_2_SEQ_LM has two")

    @classmethod
    def before(cls, config: Any, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        """Store which positions of the call are invoked: (batch, length)."""
        key = key_of(config)
        offsets = facts.get("alora_offsets")
        inputs = inputs_of(kwargs, offsets)
        if offsets is not None:
            facts[key] = from_offsets(offsets, inputs)
            return
        invoked = invoked_positions(inputs, config.alora_invocation_tokens)
        earlier = invoked_rows(caches.of_call(kwargs)).get(key)
        if earlier is not None:
            if len(earlier) != len(inputs):
                raise VeneerError(f"the cache was filled by {len(earlier)} rows, and the call has {len(inputs)}")
            invoked = invoked | earlier[:, None]
        facts[key] = invoked

    @classmethod
    def after(cls, config: Any, facts: dict[Any, Any], output: Any) -> None:
        """Record the invoked rows on the cache, for calls that continue from it."""
        cache = caches.of_output(output)
        key = key_of(config)
        if cache is None or key not in facts:
            return
        earlier = getattr(cache, "veneer_invoked", {})
        cache.veneer_invoked = {**earlier, key: facts[key][:, -1]}

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        invoked = self.target.fact(key_of(self.config))
        if invoked is not None and y.dim() == 3:
            invoked = invoked[:, -y.shape[1] :]  # the head may compute only the last positions
        if invoked is None or invoked.numel() != y[..., 0].numel():
            raise VeneerError(
                f"aLoRA on {self.target.path!r} needs a call of the whole model, and a module that sees each token of "
                f"input_ids once; this one gives {tuple(y.shape)}"
            )
        mask = invoked.reshape(*y.shape[:-1], 1)
        return torch.where(mask, super().post(x, y), y)


def key_of(config: Any) -> Key:
    """The key of an invocation's positions among the facts of a call."""
    return "alora", tuple(config.alora_invocation_tokens)


def inputs_of(kwargs: dict[str, Any], offsets: Sequence[int | None] | None) -> Tensor:
    """The tensor that gives a call's batch and length: its input_ids or, with offsets, its embeddings."""
    ids = kwargs.get("input_ids")
    if ids is not None:
        return ids
    if offsets is not None:
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is not None:
            return embeddings
        for value in kwargs.values():  # a custom model may use other names
            if isinstance(value, Tensor) and value.dim() > 1:
                return value
    raise VeneerError("aLoRA looks for its invocation in input_ids; without them, pass alora_offsets")


def invoked_positions(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """The positions from the last invocation on. A call with a single token, which continues from a cache, has none."""
    if ids.shape[1] <= 1:
        return torch.zeros_like(ids, dtype=torch.bool)
    start = find_last(ids, tokens)
    return positions(ids) >= start[:, None]


def positions(inputs: Tensor) -> Tensor:
    return torch.arange(inputs.shape[1], device=inputs.device)


def from_offsets(offsets: Sequence[int | None], inputs: Tensor) -> Tensor:
    """The invoked positions, given the distance of each invocation from the end."""
    distances = torch.tensor([offset or 0 for offset in offsets], device=inputs.device)
    return positions(inputs) >= inputs.shape[1] - distances[:, None]


def find_last(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Where `tokens` last start in each row; the row's length if they do not occur."""
    length = ids.shape[1]
    n = len(tokens)
    if length < n:
        return torch.full_like(ids[:, 0], length)
    wanted = torch.tensor(tokens, device=ids.device)
    hits = (ids.unfold(1, n, 1) == wanted).all(-1)  # (batch, length - n + 1)
    last = torch.where(hits, positions(hits), -1).amax(1)
    return torch.where(last < 0, length, last)


def invoked_rows(cache: Any) -> dict[Key, Tensor]:
    """The rows that earlier calls on a cache invoked; empty if the cache has been emptied since."""
    if not caches.is_filled(cache):
        return {}
    return getattr(cache, "veneer_invoked", {})


@dataclass(kw_only=True)
class ALoraConfig(LoraConfig):
    """Equivalent to `LoraConfig(alora_invocation_tokens=[...])`."""

    alora_invocation_tokens: list[int] | None = None
    """Ids of the tokens that invoke the adapter: it acts from their last occurrence on. Required."""

    adapter = Composition(ALoRA)  # type: ignore[assignment]
    example = {"alora_invocation_tokens": [1, 2]}
