"""Initialise a LoRA on a model from data (EVA). EVA redistributes the ranks, so the adapter is rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.attach import attach, detach
from ..errors import ConfigError, VeneerError, listing
from ..maths.precision import HALF
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
from ..targets.walk import by_number

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
    """Initialise a LoRA that has `init_lora_weights="eva"` from data. Call it before creating an optimizer.

    The adapter is rebuilt with the ranks that EVA chooses; layers other than linear ones keep the usual initialisation.

    Args:
        model: the model with the adapter.
        dataloader: batches to run; required unless `eva_state_dict` is given.
        eva_state_dict: the result of `get_eva_state_dict`. The other arguments are those of that function.

    Raises:
        VeneerError: neither is given, or `eva_state_dict` does not fit the adapter.
    """
    config = model.peft_config[adapter_name]
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ConfigError(f'adapter {adapter_name!r} was not created with init_lora_weights="eva"')
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("EVA initialises from data: give a dataloader, or the eva_state_dict of an earlier call")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    starts = {name.removeprefix(PREFIX): A for name, A in eva_state_dict.items()}
    expected = {name.removeprefix(PREFIX) for name in linear_layers(model, adapter_name)}
    difference = expected.symmetric_difference(starts)
    if difference:
        paths = sorted(difference, key=by_number)
        raise VeneerError(f"eva_state_dict does not fit the adapter; only one of them has:{listing(paths)}")
    rebuild(model, adapter_name, starts)


def rebuild(model: PeftModel, name: str, starts: Mapping[str, Tensor]) -> None:
    """Replace an adapter by one with other ranks.

    Args:
        model: the model with the adapter.
        name: which adapter.
        starts: the initial A by path; its number of rows is the new rank, and targets of rank 0 are dropped.
    """
    base = model.get_base_model()
    state = model._state
    active = state.active
    is_trainable = name in state.trainable
    adapters = state.adapters(name)
    first_path = next(iter(starts))
    is_half = adapters[first_path].dtype in HALF
    loras = {}
    for path, adapter in adapters.items():
        lora = lora_of(adapter)
        if lora is not None:
            loras[path] = lora
    config = with_ranks(state.configs[name], loras, starts)
    detach(base, name, state)
    state = attach(base, config, name, trainable=is_trainable, lift=not is_half, layer_class=state.layer_class)
    state.activate(active)
    for path, adapter in state.adapters(name).items():
        if path in starts:
            lora_of(adapter).lora_A.weight.copy_(starts[path])
