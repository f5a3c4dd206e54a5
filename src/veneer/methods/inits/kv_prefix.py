"""Initialise a learned prefix with the cache that a model computes for a text, as if the text were in the context.

    P_K, P_V = the keys and values of the text's first n tokens

Eyuboglu et al., 2025, arXiv:2506.06266. For prefixes that are stored as keys and values: cartridges, and prefix tuning
without a projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.state import state_of
from ...errors import ConfigError
from ...targets.modules import evaluating
from ...upstream import cache as caches


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first positions of a cache in the layout of a checkpoint: (n, layers x 2 x heads x head_dim).

    Args:
        past_key_values: a `DynamicCache`, or the (keys, values) of each layer, for one sequence.
        num_virtual_tokens: n, the number of positions.
    """
    blocks = []
    for keys, values in caches.pairs(past_key_values):
        blocks.append(_first_positions(keys, num_virtual_tokens))
        blocks.append(_first_positions(values, num_virtual_tokens))
    if not blocks:
        raise ConfigError("past_key_values is empty")
    return torch.cat(blocks, dim=1)


def _first_positions(t: Tensor, n: int) -> Tensor:
    """Keys or values (1, heads, length, head_dim) -> (n, heads x head_dim)."""
    sequences, _, length, _ = t.shape
    if sequences != 1 or length < n:
        raise ConfigError(
            f"the cache must hold one sequence of at least {n} tokens, not {sequences} of {length} "
            "(a sliding window keeps only the last ones)"
        )
    return t[0, :, :n].transpose(0, 1).flatten(1)


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Copy the first positions of a cache into a prefix of `model`, and return them."""
    prompt = _prefix(model, adapter_name)
    if num_virtual_tokens not in (None, prompt.n):
        raise ConfigError(f"num_virtual_tokens = {num_virtual_tokens}, but the prefix has {prompt.n} positions")
    embeddings = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=prompt.n)
    expected = prompt.export()["prompt_embeddings"].shape
    if embeddings.shape != expected:
        raise ConfigError(
            f"the cache has shape {tuple(embeddings.shape)}, the prefix {tuple(expected)}; is it from another model?"
        )
    prompt.absorb({"prompt_embeddings": embeddings})
    return embeddings


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Initialise a prefix of `model` with a text, as a system message if the tokenizer has a chat template.

    Args:
        text: must have at least as many tokens as the prefix has positions; further tokens are ignored.
        adapter_name: the name of the prefix; None: the active adapter.
        num_virtual_tokens: if given, checked against the prefix.
        use_chat_template: False: use the text as it is.
        max_length: use at most this many tokens of the text.
    """
    prompt = _prefix(model, adapter_name)
    ids = _token_ids(tokenizer, text, use_chat_template)
    length = len(ids[:max_length])
    if length < prompt.n:
        raise ConfigError(f"the text has {length} tokens, the prefix {prompt.n} positions")
    first = torch.tensor([ids[: prompt.n]], device=model.device)  # later tokens do not change the keys of earlier ones
    cache = _cache_of(model, first)
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def _token_ids(tokenizer: Any, text: str, use_chat_template: bool) -> list[int]:
    if not use_chat_template or not getattr(tokenizer, "chat_template", None):
        return tokenizer(text)["input_ids"]
    messages = [{"role": "system", "content": text}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _cache_of(model: Any, input_ids: Tensor) -> Any:
    """The cache that the base model computes for a sequence, in evaluation mode."""
    with evaluating(model), model.disable_adapter():
        output = model(input_ids=input_ids, use_cache=True)
        return caches.of_output(output)


def _prefix(model: Any, name: str | None) -> Any:
    """The adapter called `name` (by default the active one).

    Raises:
        ConfigError: it is not a prefix whose keys and values can be set.
    """
    name = name or model.active_adapter
    state = state_of(model.get_base_model())
    assert state is not None
    config = state.configs.get(name)
    prompt = state.prompts.get(name)
    fills_cache = getattr(config, "fills_cache", False)
    is_projected = getattr(prompt, "is_projected", False)
    if prompt is None or not fills_cache or is_projected:
        raise ConfigError(f"adapter {name!r} holds no keys and values of its own that could be set")
    if prompt.spec.submodules == 2:
        raise ConfigError(f"adapter {name!r}: a prefix of an encoder-decoder cannot be initialised from a cache")
    return prompt
