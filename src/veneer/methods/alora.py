"""aLoRA: LoRA that acts only from its invocation on, so that the cache of what stands before is the base model's.

    y_t = W x_t + [t >= t0] s B A x_t,  t0 the start of the last occurrence of the invocation tokens in the row

Greenewald et al., 2025, arXiv:2504.12397. Trainable: as LoRA. Not mergeable: W is right before t0. Starts as a no-op. A
row without the invocation runs as the base model. The invocation must lie whole in one call of more than one token;
calls that go on from a cache remember the rows that were invoked, also where PEFT forgets them (a loop of your own).
`alora_offsets`, an argument of a call and of `generate`, gives each row's distance of t0 from the end, or None.
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
            raise ConfigError("aLoRA acts from a position of one sequence on, which SEQ_2_SEQ_LM does not have")

    @classmethod
    def before(cls, config: Any, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        """Which positions of the call are invoked: (batch, length)."""
        ids, given, key = kwargs.get("input_ids"), facts.get("alora_offsets"), key_of(config)
        inputs = kwargs.get("inputs_embeds") if ids is None else ids
        if inputs is None and given is not None:  # a model of one's own may call them otherwise
            inputs = next((value for value in kwargs.values() if isinstance(value, Tensor) and value.dim() > 1), None)
        if inputs is None or (ids is None and given is None):
            raise VeneerError("aLoRA looks for its invocation in input_ids; without them, pass alora_offsets")
        if given is not None:
            facts[key] = from_offsets(given, inputs)
            return
        start = find_last(inputs, key[1]) if inputs.shape[1] > 1 else torch.full_like(inputs[:, 0], 1)
        seen = notes(caches.of_call(kwargs)).get(key)
        if seen is not None and len(seen) != len(inputs):
            raise VeneerError(f"the cache was filled by {len(seen)} rows, and the call has {len(inputs)}")
        invoked = positions(inputs) >= start[:, None]
        facts[key] = invoked if seen is None else invoked | seen[:, None]

    @classmethod
    def after(cls, config: Any, facts: dict[Any, Any], output: Any) -> None:
        """Leave a note on the cache, for the calls that go on from it."""
        cache, key = caches.of_output(output), key_of(config)
        if cache is not None and key in facts:
            cache.veneer_invoked = {**getattr(cache, "veneer_invoked", {}), key: facts[key][:, -1]}

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        invoked = self.target.fact(key_of(self.config))
        if invoked is not None and y.dim() == 3:
            invoked = invoked[:, -y.shape[1] :]  # the head may be asked for the last positions alone
        if invoked is None or invoked.numel() != y[..., 0].numel():
            raise VeneerError(
                f"aLoRA on {self.target.path!r} needs a call of the whole model, and a module that sees each token of "
                f"input_ids once; this one gives {tuple(y.shape)}"
            )
        return torch.where(invoked.reshape(*y.shape[:-1], 1), super().post(x, y), y)


def key_of(config: Any) -> Key:
    return "alora", tuple(config.alora_invocation_tokens)


def positions(inputs: Tensor) -> Tensor:
    return torch.arange(inputs.shape[1], device=inputs.device)


def from_offsets(offsets: Sequence[int | None], inputs: Tensor) -> Tensor:
    """Invoked positions by their distance from the end."""
    last = torch.tensor([offset or 0 for offset in offsets], device=inputs.device)
    return positions(inputs) >= inputs.shape[1] - last[:, None]


def find_last(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Where `tokens` last start in each row; the row's length where they do not occur."""
    length, n = ids.shape[1], len(tokens)
    if length < n:
        return torch.full_like(ids[:, 0], length)
    hits = (ids.unfold(1, n, 1) == torch.tensor(tokens, device=ids.device)).all(-1)
    places = torch.where(hits, torch.arange(hits.shape[1], device=ids.device), -1).amax(1)
    return torch.where(places < 0, length, places)


def notes(cache: Any) -> dict[Key, Tensor]:
    """The rows that earlier calls on a cache left invoked; nothing where it was emptied since."""
    return getattr(cache, "veneer_invoked", {}) if caches.is_filled(cache) else {}


@dataclass(kw_only=True)
class ALoraConfig(LoraConfig):
    """`LoraConfig(alora_invocation_tokens=[...])` under a name of its own."""

    alora_invocation_tokens: list[int] | None = None
    """The tokens from whose last occurrence on the adapter acts; required."""

    adapter = Composition(ALoRA)  # type: ignore[assignment]
    example = {"alora_invocation_tokens": [1, 2]}
