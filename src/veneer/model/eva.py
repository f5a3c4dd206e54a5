"""Starting the LoRA of a model from data by EVA: its layers get other ranks, so the adapter is built anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.attach import attach, detach
from ..core.placement import HALF
from ..errors import ConfigError, VeneerError, listing
from ..methods.inits.eva import (
    PREFIX,
    forward_fn_dict,
    get_eva_state_dict,
    linear_layers,
    lora_of,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
    with_ranks,
)

if TYPE_CHECKING:
    from .peft_model import PeftModel


@torch.no_grad()
def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Any = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Any = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start a LoRA with `init_lora_weights="eva"` from data. Call it before an optimizer is made.

    The adapter is built anew with the ranks that EVA gives; layers other than linear ones start as usual.

    Args:
        dataloader: batches to run; or
        eva_state_dict: what `get_eva_state_dict` found. The other arguments are those of that function.

    Raises:
        VeneerError: neither is given, or the second does not fit the adapter.
    """
    config = model.peft_config[adapter_name]
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ConfigError(f'adapter {adapter_name!r} was not made with init_lora_weights="eva"')
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("EVA starts from data: give a dataloader, or an eva_state_dict from before")
        how = (forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name)
        eva_state_dict = get_eva_state_dict(model, dataloader, None, *how, gather_distributed_inputs, show_progress_bar)
    found = {name.removeprefix(PREFIX): A for name, A in eva_state_dict.items()}
    here = [name.removeprefix(PREFIX) for name in linear_layers(model, adapter_name)]
    if set(found) != set(here):
        raise VeneerError(f"eva_state_dict and the adapter differ in:{listing(sorted(set(found) ^ set(here)))}")
    rebuild(model, adapter_name, found)


def rebuild(model: PeftModel, name: str, found: Mapping[str, Tensor]) -> None:
    """The adapter again, with a rank of len(A) on each target of `found`, and none where that is 0."""
    base = model.get_base_model()
    state = model._state
    active, trainable, adapters = state.active, name in state.trainable, state.adapters(name)
    half = next(adapters[path] for path in found).dtype in HALF
    loras = {path: lora for path, a in adapters.items() if (lora := lora_of(a)) is not None}
    config = with_ranks(state.configs[name], loras, found)
    detach(base, name, state)
    state = attach(base, config, name, trainable=trainable, lift=not half)
    state.activate(active)
    for path, adapter in state.adapters(name).items():
        if path in found:
            lora_of(adapter).lora_A.weight.copy_(found[path])
