"""transformers' attention and mask interfaces: finding, registering and choosing attention implementations.

The interfaces, and the private config field that names the implementation, are the same in 5.20 to 5.24.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

FIELD = "_attn_implementation"
"""The field of a config that names the implementation."""


def configs(model: nn.Module, among: Container[str]) -> list[Any]:
    """The configs of the model's modules whose attention implementation is one of `among`."""
    by_identity = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and getattr(config, FIELD, None) in among:
            by_identity[id(config)] = config
    return list(by_identity.values())


@contextmanager
def implementation(configs: Sequence[Any], name: str) -> Iterator[None]:
    """Use the attention implementation `name` inside the block, for the modules with these configs."""
    before = [getattr(config, FIELD) for config in configs]
    try:
        for config in configs:
            setattr(config, FIELD, name)
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            setattr(config, FIELD, old)


def register(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Register an attention implementation: a function that computes attention, and one that creates its masks."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def sdpa_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that the "sdpa" implementation uses."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **kwargs)


def sdpa_attention(*args: Any, **kwargs: Any) -> Any:
    """Attention computed by the "sdpa" implementation."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*args, **kwargs)
