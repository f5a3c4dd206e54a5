"""Trying an adapter that changes the model's call as soon as it is attached.

Learned positions and networks beside the model depend on how its code treats embeddings, caches and positions, which no
config tells. A model that cannot take them fails deep inside its own code. Two tokens show it before anything is
trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, VeneerError
from ..upstream import cache as caches
from .state import State

TRAINING, FIRST, BOTH = (2, False), (2, True), (3, True)
"""Ways to call a model: the number of tokens, and whether with a cache. With a cache, the last of three tokens comes in
a second call, which continues with the cache of the first."""


def check(model: nn.Module, state: State, name: str) -> None:
    """Raise unless the model runs with the adapter called `name`, if that adapter changes the model's call.

    Nothing is checked on a model that cannot be called here, or that needs other inputs than tokens.

    Raises:
        ConfigError: the model fails with the adapter and runs without it.
    """
    members = state.configs[name].members()
    if not any(member.changes_call for member in members) or not _is_present(model):
        return
    failure = _failure_of(model, state, name)
    if failure is None:
        return
    method = " + ".join(member.peft_type for member in members)
    reason = " ".join(str(failure).split())
    kind = "" if isinstance(failure, VeneerError) else f"{type(failure).__name__}: "
    raise ConfigError(
        f"{method} cannot be used on {type(model).__name__}: calling the model with it fails, and without it does not "
        f"({kind}{reason}). Use a method that adapts layers, such as LoRA"
    ) from failure


def _is_present(model: nn.Module) -> bool:
    """Whether this process holds all weights, and the model is not a compiled one, which a trial would compile."""
    if hasattr(model, "_orig_mod"):
        return False
    for parameter in model.parameters():
        if parameter.is_meta or not parameter.numel() or hasattr(parameter, "full_tensor"):
            return False
    return True


def _failure_of(model: nn.Module, state: State, name: str) -> Exception | None:
    """What the model raises with the adapter and not without it; None if nothing, or if it cannot be called so."""
    generates = hasattr(model, "can_generate") and model.can_generate()
    ways = (TRAINING, FIRST, BOTH) if generates else (TRAINING,)
    for way in ways:
        failure = _failure(model, state, (name,), *way)
        if failure is not None and _failure(model, state, (), *way) is None:
            return failure
    return None


def _failure(model: nn.Module, state: State, names: tuple[str, ...], length: int, has_cache: bool) -> Exception | None:
    """What the model raises when it is called with only these adapters active; None if nothing."""
    with _quietly(model, state, names):
        try:
            _call(model, length, has_cache)
        except Exception as error:
            # without facts that only the caller knows, such as task_ids, a method cannot be tried
            is_of_facts = isinstance(error, VeneerError) and len(state.fact_names()) > 1
            return None if is_of_facts else error
    return None


@contextmanager
def _quietly(model: nn.Module, state: State, names: tuple[str, ...]) -> Iterator[None]:
    """Make a call leave no trace: evaluation mode, no gradients, no watchers, and all as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    active, enabled, watchers, facts = state.active, state.enabled, state.watchers, state.facts
    model.eval()
    state.active, state.enabled, state.watchers = names, True, []
    try:
        with torch.no_grad():
            yield
    finally:
        state.active, state.enabled, state.watchers, state.facts = active, enabled, watchers, facts
        for module, mode in modes.items():
            module.training = mode


def _call(model: Any, length: int, has_cache: bool) -> None:
    """Call the model as training does, or as `generate` does: at most two tokens at once, with a cache."""
    argument = caches.argument(model)
    device = model.get_input_embeddings().weight.device
    if argument is None or not has_cache:
        no_cache = {} if argument is None else {"use_cache": False}
        model(**_arguments(model, length, length, device), **no_cache)
        return
    cache = _first_cache(model)
    done = 0
    while done < length:
        count = min(2, length - done)
        done += count
        kwargs = _arguments(model, count, done, device)
        if cache is not None:
            kwargs[argument] = cache
        cache = caches.of_output(model(**kwargs, use_cache=True))
        if cache is None:
            return


def _first_cache(model: Any) -> Any:
    """The empty cache that `generate` would pass to the first call; None where it leaves that to the model."""
    takes_usual = getattr(model, "_supports_default_dynamic_cache", None)
    if caches.argument(model) is None or takes_usual is None or not takes_usual():
        return None
    return caches.new(model, bool(getattr(model.config, "is_encoder_decoder", False)))


def _arguments(model: Any, count: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """The inputs of a call of `count` tokens, the last of `length`."""
    tokens = torch.ones(1, count, dtype=torch.long, device=device)
    mask = torch.ones(1, length, dtype=torch.long, device=device)
    if getattr(model.config, "is_encoder_decoder", False):
        source = torch.ones_like(mask)
        return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": tokens}
    return {"input_ids": tokens, "attention_mask": mask}
