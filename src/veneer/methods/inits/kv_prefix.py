"""Start a learned prefix at the cache that a model fills from a text, so that it begins as that text in the context.

    P_K, P_V = the keys and values of the text's first n tokens

Eyuboglu et al., 2025, arXiv:2506.06266. For prefixes held as they are: cartridges, unprojected prefix tuning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.state import state_of
from ...errors import ConfigError
from ...upstream import cache as caches


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first positions of a cache in the layout of a file: (n, layers x 2 x heads x head_dim).

    Args:
        past_key_values: a `DynamicCache` or (keys, values) of each layer, of one sequence.
    """
    rows = []
    for keys, values in caches.pairs(past_key_values):
        for t in (keys, values):
            if t.shape[0] != 1 or t.shape[2] < num_virtual_tokens:
                raise ConfigError(
                    f"the cache must hold one sequence of at least {num_virtual_tokens} tokens, not {t.shape[0]} of "
                    f"{t.shape[2]} (a sliding window keeps only the last ones)"
                )
            rows.append(t[0, :, :num_virtual_tokens].transpose(0, 1).flatten(1))  # (n, heads x head_dim)
    if not rows:
        raise ConfigError("past_key_values is empty")
    return torch.cat(rows, dim=1)


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Put the first positions of a cache into a prefix of `model`; returns them."""
    prompt = _prefix(model, adapter_name)
    if num_virtual_tokens not in (None, prompt.n):
        raise ConfigError(f"num_virtual_tokens = {num_virtual_tokens}, but the prefix has {prompt.n} positions")
    rows = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=prompt.n)
    expected = prompt.export()["prompt_embeddings"].shape
    if rows.shape != expected:
        raise ConfigError(f"the cache has {tuple(rows.shape)} numbers, the prefix {tuple(expected)}: another model's?")
    prompt.absorb({"prompt_embeddings": rows})
    return rows


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
    """Start a prefix of `model` at a text: as its system message where the tokenizer has a chat template."""
    prompt = _prefix(model, adapter_name)
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template([{"role": "system", "content": text}], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    if len(ids[:max_length]) < prompt.n:
        raise ConfigError(f"the text has {len(ids[:max_length])} tokens, the prefix {prompt.n} positions")
    first = torch.tensor([ids[: prompt.n]], device=model.device)  # later tokens do not change the keys of earlier ones
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            cache = caches.of_output(model(input_ids=first, use_cache=True))
    finally:
        model.train(was_training)
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def _prefix(model: Any, name: str | None) -> Any:
    """The adapter called `name` (the active one by default), if it is a prefix that can be set."""
    name = name or model.active_adapter
    state = state_of(model.get_base_model())
    assert state is not None
    config, prompt = state.configs.get(name), state.prompts.get(name)
    if prompt is None or not getattr(config, "fills_cache", False) or getattr(prompt, "is_projected", False):
        raise ConfigError(f"adapter {name!r} holds no keys and values of its own that could be set")
    if prompt.spec.submodules == 2:
        raise ConfigError(f"adapter {name!r}: a prefix of an encoder-decoder cannot be started from a cache")
    return prompt
