"""An adapter's tensors from a state dict of the whole model, as accelerate gathers it and moving averages make it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError, listing
from . import checkpoint
from .adapter import Tensors
from .checkpoint import Given
from .state import State

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile put in front of a model's keys."""


def values(model: nn.Module, state: State, name: str, state_dict: Mapping[str, Tensor]) -> Given:
    """The values for an adapter's file if the model's tensors are those in `state_dict`.

    Args:
        model: the model that `state_dict` is of.
        state_dict: tensors by the names of the model's parameters, or by the keys of an adapter's file.

    Raises:
        CheckpointError: tensors of the adapter are missing.
    """
    given = _unwrapped(state_dict)
    paths = {id(module): path for path, module in model.named_modules()}
    tensors: Tensors = {}
    missing: list[str] = []
    for prefix, part in checkpoint.parts(state, name):
        part_values: Tensors = {}
        lacking = []
        for key in part.state_dict():
            full = f"{paths[id(part)]}.{key}"
            if full in given:
                part_values[key] = given[full]
            else:
                lacking.append(full)
        keys = {prefix + key for key in checkpoint.export(part)}
        if lacking and keys <= given.keys():
            for key in keys:
                tensors[key] = given[key]
            continue
        missing += lacking
        with _holding(part, part_values):
            for key, tensor in checkpoint.export(part).items():
                tensors[prefix + key] = tensor
    if missing:
        raise CheckpointError(
            f"state_dict lacks {len(missing)} tensors of adapter {name!r}:{listing(missing)}\n"
            "Leave state_dict out to save the model's own values."
        )
    return Given(tensors, given)


def _unwrapped(state_dict: Mapping[str, Tensor]) -> Tensors:
    """A state dict under the names of the model without wrappers, of which there may be several in any order."""
    tensors = {}
    for key, tensor in state_dict.items():
        while key.startswith(WRAPPERS):
            key = key.partition(".")[2]
        tensors[key] = tensor
    return tensors


@contextmanager
def _holding(part: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a module has other values in its parameters and buffers."""
    before = []
    for key, value in values.items():
        path, _, leaf = key.rpartition(".")
        owner = part.get_submodule(path)
        held: Any = owner._parameters if leaf in owner._parameters else owner._buffers
        before.append((held, leaf, held[leaf]))
        held[leaf] = nn.Parameter(value, requires_grad=False) if held is owner._parameters else value
    try:
        yield
    finally:
        for held, leaf, tensor in before:
            held[leaf] = tensor
