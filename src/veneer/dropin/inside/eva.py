"""`peft.tuners.lora.eva`: how EVA calls a model, and which of its inputs it looks at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...methods.inits.eva import forward_fn_dict, prepare_model_inputs_fn_language_modeling

__all__ = [
    "forward_fn_dict",
    "prepare_layer_inputs_fn_language_modeling",
    "prepare_model_inputs_fn_language_modeling",
]


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The rows of a layer's input at the positions that `prepare_model_inputs_fn_language_modeling` chose.

    Raises:
        ValueError: the input is not a tensor.
    """
    if isinstance(layer_input, (list, tuple)):
        layer_input = layer_input[0]
    if not isinstance(layer_input, torch.Tensor):
        raise ValueError(f"the input of layer {layer_name} is a {type(layer_input).__name__}, not a tensor")
    rows, columns = model_input.T
    return layer_input[rows, columns]
