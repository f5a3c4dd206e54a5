"""The root hooks: what veneer does before and after each call of the Hugging Face model, in order.

`generate`, TRL and `Trainer` call the Hugging Face model directly, without `PeftModel.forward`, so one pre-hook and one
post-hook on it serve them all. `before` installs the fast paths of modules, takes the adapters' facts out of the
arguments, lets methods compute facts, adds prompts to the input, and installs the fast paths for loss and padding.
`after` passes the output to methods and prompts, adds loss terms, and removes the fast paths for loss and padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import VeneerError
from ..ops import _patch as fast
from ..ops._conditions import takes_part
from ..upstream import cache as caches
from ..upstream import checkpointing
from ..upstream.calls import OF_PAIRS, encoder_of, parameters
from .calls import batch_size, by_row
from .prompt import Prompt
from .state import BASE, LOSS_TERMS, Row, State, adapters_of, state_of

CHILDREN = {"veneer_shared": "shared", "veneer_prompts": "prompts"}
"""Names of the Hugging Face model's children that hold shared modules and prompts, if there are any."""


def install(model: nn.Module, state: State) -> None:
    """Register the state, the hooks, the shared modules and the prompts on the model."""
    if state_of(model) is None:
        model.__dict__["_veneer"] = state
        state.cache_argument = caches.argument(model)
        state.arguments = positional(model)
        hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, always_call=True),
        ]
        encoder = encoder_of(model)
        if encoder is not None:
            hooks.append(encoder.register_forward_pre_hook(before_encoder, with_kwargs=True))
            encoder.__dict__["_veneer_root"] = (state,)
            state.encoder_arguments = positional(encoder)
        model.__dict__["_veneer_hooks"] = hooks
    for child, group in CHILDREN.items():
        modules = getattr(state, group)
        if len(modules):
            model._modules[child] = modules
        else:
            model._modules.pop(child, None)


def uninstall(model: nn.Module) -> None:
    """Restore the model to its state before the first adapter."""
    for hook in model.__dict__.pop("_veneer_hooks", ()):
        hook.remove()
    fast.uninstall(model)
    model.__dict__.pop("_veneer", None)
    for child in CHILDREN:
        model._modules.pop(child, None)
    encoder = encoder_of(model)
    if encoder is not None:
        encoder.__dict__.pop("_veneer_root", None)


def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The root pre-hook: returns the arguments that the model receives."""
    state = state_of(model)
    if state is None or state.busy:
        return args, kwargs
    if takes_part(model):
        fast.fit(model)
    args, kwargs = _prepared(model, state, args, kwargs)
    fast.begin(model, args, kwargs, state)
    return args, kwargs


def _prepared(model: nn.Module, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a call without the adapters' facts and with prompts in front of the input."""
    for watcher in state.watchers:
        watcher.before(model, named(state.arguments, args, kwargs))
    facts = dict(state.sticky)
    kwargs = dict(kwargs)
    for name in state.fact_names():
        value = kwargs.pop(name, None)
        if value is not None:
            facts[name] = value
    state.facts = by_row(facts, kwargs, args)
    check_names(state)
    for name in called(state):
        _compute_facts(state, name, model, named(state.arguments, args, kwargs))
    prompts = list(live_prompts(state))
    if prompts:
        kwargs = named(state.arguments, args, kwargs)
        args = args[len(state.arguments) :]  # surplus ones, which the model itself refuses
    for prompt in prompts:
        kwargs = splice(model, prompt, state, kwargs)
    return args, kwargs


def after(model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The root post-hook. It also runs after a call that failed; `output` is then None."""
    state = state_of(model)
    if state is None or state.busy:
        return output
    try:
        return None if output is None else _finished(model, state, output)
    finally:
        fast.end(model)


def _finished(model: nn.Module, state: State, output: Any) -> Any:
    """The output, with the loss of a prompt that defines one, and with the adapters' loss terms added."""
    for name in called(state):
        state.configs[name].after(state.facts, output)
    if getattr(output, "loss", None) is not None:
        _change_loss(state, output)
    for watcher in state.watchers:
        watcher.after(model, output)
    return output


def _change_loss(state: State, output: Any) -> None:
    for prompt in live_prompts(state):
        replacement = prompt.loss(getattr(output, "logits", None), state.facts)
        if replacement is not None:
            output.loss = replacement
    if not torch.is_grad_enabled():
        return
    terms = loss_terms(state)
    if terms is not None:
        terms = terms.to(output.loss)
        output.loss = output.loss + terms
        state.facts[LOSS_TERMS] = state.facts.get(LOSS_TERMS, 0.0) + terms.detach()


def loss_terms(state: State) -> Tensor | None:
    """The sum of the terms that methods in training add to a loss, such as AdaLoRA's orthogonality; None without any.

    A call with labels adds them to the model's loss; a caller that computes another loss adds them itself.
    """
    total = None
    for name in state.live():
        if name not in state.trainable:
            continue
        term = state.configs[name].loss(list(state.adapters(name).values()))
        if term is not None:
            term = term.full_tensor() if hasattr(term, "full_tensor") else term
            total = term if total is None else total + term
    return total


def called(state: State) -> list[str]:
    """The adapters that take part in the current call."""
    names = state.live()
    if "adapter_names" in state.facts:
        names = _of_rows(state.facts["adapter_names"])
    return [name for name in dict.fromkeys(names) if name in state.configs]


def _of_rows(rows: Sequence[Row]) -> tuple[str, ...]:
    """The names of all adapters that the rows of a mixed batch use, each once."""
    names: dict[str, None] = {}
    for row in dict.fromkeys(rows):
        names |= dict.fromkeys(adapters_of(row))
    return tuple(names)


def check_names(state: State) -> None:
    """Raise VeneerError unless a mixed batch names adapters that exist, have layers, and are not merged."""
    if not isinstance(state.facts.get("adapter_names", []), (list, tuple)):
        raise VeneerError(
            f"adapter_names must be a list with a name for each row, not {state.facts['adapter_names']!r}"
        )
    for name in _of_rows(state.facts.get("adapter_names", ())):
        if name not in state.configs:
            known = ", ".join(state.configs)
            raise VeneerError(f"adapter_names: no adapter is called {name!r}; the model has {known} and {BASE!r}")
        if name in state.prompts:
            raise VeneerError(
                f"adapter_names: {name!r} is a prompt, which lengthens every row; use it in a separate batch"
            )
    if "adapter_names" in state.facts and any(layer.merged_adapters for layer in state.layers.values()):
        raise VeneerError("a mixed batch needs adapters that are not merged; call unmerge_adapter() first")


def live_prompts(state: State) -> Iterator[Prompt]:
    """The prompts that take part in this call, innermost (nearest to the input) first."""
    if "adapter_names" not in state.facts:
        for name in state.live():
            if name in state.prompts:
                yield state.prompts[name]


def _compute_facts(state: State, name: str, model: nn.Module, kwargs: dict[str, Any], of_encoder: bool = False) -> None:
    state.busy = True
    try:
        for member in state.configs[name].members():
            if member.reads_encoder or not of_encoder:
                member.before(state.shared.get(name), state.facts, model, kwargs)
    finally:
        state.busy = False


def splice(model: nn.Module, prompt: Prompt, state: State, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a root call with a prompt in front of the input."""
    if caches.is_static(caches.of_call(kwargs)):
        raise VeneerError("a learned prompt cannot lengthen a static cache; use the default dynamic cache")
    pairs = prompt.key_values(state.facts)
    if pairs is not None:
        return _with_cache(model, prompt, state, pairs, kwargs)
    if encoder_of(model) is not None:
        return _lengthen_encoder_mask(prompt, kwargs)
    return _with_embeds(model, prompt, state.facts, kwargs)


def before_encoder(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The encoder's pre-hook, which adds facts and embeddings, because `generate` calls the encoder directly."""
    (state,) = encoder.__dict__.get("_veneer_root", (None,))
    if state is None or state.busy:
        return args, kwargs
    state.facts = dict(state.facts)
    kwargs = named(state.encoder_arguments, args, kwargs)
    for name in called(state):
        _compute_facts(state, name, encoder, kwargs, of_encoder=True)
    for prompt in live_prompts(state):
        if prompt.key_values(state.facts) is None:
            kwargs = _with_embeds(encoder, prompt, state.facts, kwargs)
    return (), kwargs


def _with_embeds(model: nn.Module, prompt: Prompt, facts: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with embeddings in front, and with mask, positions, labels and token types extended to match."""
    n = prompt.n
    kwargs = dict(kwargs)
    if caches.is_filled(caches.of_call(kwargs)):
        kwargs["attention_mask"] = _longer_mask(kwargs.get("attention_mask"), n)
        kwargs["position_ids"] = _shifted(kwargs.get("position_ids"), n)
        return _given(kwargs)
    for name in OF_PAIRS:
        if kwargs.get(name) is not None:
            raise VeneerError(f"a learned prompt cannot lengthen {name}; use a method that adapts layers, such as LoRA")
    inputs = kwargs.pop("inputs_embeds", None)
    ids = kwargs.pop("input_ids", None)
    if inputs is None:
        inputs = model.get_input_embeddings()(ids)
    learned = prompt.embeds(facts).to(inputs.dtype)
    if learned.dim() == 2:
        learned = learned.expand(inputs.shape[0], -1, -1)
    kwargs["inputs_embeds"] = torch.cat([learned, inputs], dim=1)
    mask = kwargs.get("attention_mask")
    if mask is None or mask.shape[-1] == inputs.shape[1]:
        kwargs["attention_mask"] = _longer_mask(mask, n)
    if _per_token(kwargs.get("labels"), inputs):
        kwargs["labels"] = prompt.labels(kwargs["labels"], facts)
    for answer in ("start_positions", "end_positions"):
        kwargs[answer] = _shifted(kwargs.get(answer), n)
    kwargs["token_type_ids"] = _longer(kwargs.get("token_type_ids"), n, 0)
    kwargs["position_ids"] = _longer_positions(kwargs.get("position_ids"), n)
    return _given(kwargs)


def _with_cache(model: nn.Module, prompt: Prompt, state: State, pairs: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a cache that starts with the learned keys and values, and with longer mask and positions.

    The cache is also stored as the fact "filled".
    """
    _refuse_checkpointing(model)
    # with use_cache=False every call has the whole sequence, even if the cache of an earlier call is passed too
    cache = None if kwargs.get("use_cache") is False else caches.of_call(kwargs)
    rows = batch_size((), kwargs)
    assert rows is not None and state.cache_argument is not None
    if not caches.is_filled(cache):
        cache = state.facts["filled"] = _filled(model, cache, pairs, rows)
    kwargs = caches.with_cache(kwargs, state.cache_argument, cache)
    if encoder_of(model) is not None:
        kwargs["decoder_attention_mask"] = _longer_mask(kwargs.get("decoder_attention_mask"), prompt.n)
        return _given(kwargs)
    kwargs["attention_mask"] = _longer_mask(kwargs.get("attention_mask"), prompt.n)
    kwargs["position_ids"] = _shifted(kwargs.get("position_ids"), prompt.n)
    return _given(kwargs)


def _filled(model: nn.Module, cache: Any, pairs: list[tuple[Tensor, Tensor]], rows: int) -> Any:
    """A cache (the caller's empty one, or a new one) that starts with the learned keys and values."""
    if cache is None:
        cache = caches.new(model, encoder_of(model) is not None)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    expanded = []
    for keys, values in pairs:
        keys = keys.to(dtype).expand(rows, -1, -1, -1)
        values = values.to(dtype).expand(rows, -1, -1, -1)
        expanded.append((keys, values))
    caches.fill(cache, expanded, model.config.get_text_config(decoder=True))  # type: ignore[union-attr]
    return cache


def _refuse_checkpointing(model: nn.Module) -> None:
    if model.training and checkpointing.is_on(model):
        raise VeneerError(
            "a learned prefix is part of the cache, which gradient checkpointing drops; turn gradient_checkpointing off"
        )


def _lengthen_encoder_mask(prompt: Prompt, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a longer encoder mask, for the decoder; the encoder's hook adds the prompt itself."""
    return _given({**kwargs, "attention_mask": _longer_mask(kwargs.get("attention_mask"), prompt.n)})


def _longer(t: Tensor | None, n: int, value: int) -> Tensor | None:
    return None if t is None else torch.cat([t.new_full((*t.shape[:-1], n), value), t], dim=-1)


def _longer_mask(mask: Tensor | None, n: int) -> Tensor | None:
    if mask is not None and mask.dim() != 2:
        raise VeneerError(
            f"a learned prompt needs an attention mask of shape (batch, length), not one with {mask.dim()} dimensions"
        )
    return _longer(mask, n, 1)


def _longer_positions(positions: Tensor | None, n: int) -> Tensor | None:
    if positions is None:
        return None
    first = torch.arange(n, device=positions.device, dtype=positions.dtype).expand(*positions.shape[:-1], n)
    return torch.cat([first, positions + n], dim=-1)


def _shifted(t: Tensor | None, n: int) -> Tensor | None:
    return None if t is None else t + n


def _per_token(labels: Tensor | None, inputs: Tensor) -> bool:
    return labels is not None and not labels.is_floating_point() and labels.shape == inputs.shape[:2]


def positional(model: nn.Module) -> tuple[str, ...]:
    """The names of the positional arguments of a call; only `input_ids` for models of other libraries."""
    names = parameters(model) if hasattr(model, "config") else ()
    return names or ("input_ids",)


def named(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, including the positional ones."""
    if not args:
        return kwargs
    named_args = dict(zip(names[: len(args)], args[: len(names)], strict=True))
    return {**named_args, **kwargs}


def _given(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if value is not None}
