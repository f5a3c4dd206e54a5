"""Measure the memory of a training step by running it on the meta device, where tensors have sizes but no values.

Each storage that an operation allocates is counted while it is alive. This works for any architecture and method, and
includes saved activations, gradients, and the logits with their gradients, which are often the peak.
"""

from __future__ import annotations

import weakref
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from ..ops._patch import fit

DEEP = 8
"""Stacks of at least this many layers are measured by running fewer layers."""
SHORT = (2, 4)
"""Numbers of layers that are run instead of a deep stack."""


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, except those of a module's parameters and buffers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in (*module.parameters(), *module.buffers()):
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            is_bool = args[0].dtype == torch.bool
            return True if is_bool else 1  # the usual answer to checks such as "is nothing packed?"
        out = func(*args, **kwargs or {})
        tree_map_only(Tensor, self._note, out)
        return out

    def _note(self, tensor: Tensor) -> Tensor:
        """Count the storage of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())
        return tensor

    def _free(self, size: int) -> None:
        self.now -= size


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention: on the meta device torch would form whole attention matrices, which no real device does."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(q.dtype)
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
        v = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, *_ = flash(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)
    return output


def step_peak(model: Any, batch_size: int, length: int) -> int:
    """Peak bytes of a forward and backward pass of an adapted model on the meta device.

    Includes activations and gradients, not the weights. The loss is over all tokens. In place of a deep stack of equal
    layers, two short stacks are run, and the result is extrapolated.

    Raises:
        RuntimeError: the model or the method reads values of tensors, which the meta device does not have.
    """
    model.train()
    ids = torch.empty(batch_size, length, dtype=torch.long, device="meta")
    fit(model.get_base_model())  # while the model has all of its layers
    stack = _stack(model.get_base_model())
    if stack is not None:
        try:
            return _extrapolated(model, ids, *stack)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):  # the model needs all of its layers
            pass
    peak, _ = _run(model, ids)
    return peak


def _run(model: Any, ids: Tensor) -> tuple[int, int]:
    """(bytes at the peak, bytes at the end) of a step; at the end the gradients are alive."""
    # A TorchFunctionMode is inactive in the backward pass, so it would miss the layers that are recomputed there.
    with Live(model) as live, patch("torch.nn.functional.scaled_dot_product_attention", _attention):
        _loss(model, ids).backward()
    peak = live.peak
    end = live.now
    model.zero_grad(set_to_none=True)
    return peak, end


def _stack(base: nn.Module) -> tuple[nn.Module, str] | None:
    """The parent and the name of the model's deep list of equal layers; None if it has no such list, or several."""
    stacks = []
    for parent in base.modules():
        for name, child in parent.named_children():
            if type(child) is nn.ModuleList and len(child) >= DEEP and _are_equal(child):
                stacks.append((parent, name))
    if len(stacks) != 1:
        return None
    return stacks[0]


def _are_equal(layers: nn.ModuleList) -> bool:
    """Whether all layers have the same class and parameters of the same shapes."""
    return len({_signature(layer) for layer in layers}) == 1


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    parameters = [(name, p.shape, p.requires_grad) for name, p in layer.named_parameters()]
    return type(layer), *parameters


def _extrapolated(model: Any, ids: Tensor, parent: nn.Module, name: str) -> int:
    """The peak of the whole stack, extrapolated from two short stacks.

    The peak is during the step, when activations are largest, or with short rows at the end, when all gradients exist.
    """
    layers = parent.get_submodule(name)
    assert isinstance(layers, nn.ModuleList)
    runs = []
    try:
        for count in SHORT:
            setattr(parent, name, layers[:count])
            runs.append(_run(model, ids))
    finally:
        setattr(parent, name, layers)
    low, high = SHORT
    totals = []
    for low_bytes, high_bytes in zip(*runs, strict=True):
        totals.append(low_bytes + (high_bytes - low_bytes) * (len(layers) - low) // (high - low))
    return max(totals)


def _loss(model: Any, ids: Tensor) -> Tensor:
    """The model's loss over all tokens, or the mean of its output if it has no language modelling head."""
    if not model.get_base_model().can_generate():
        return model(input_ids=ids)[0].float().mean()
    arguments = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {"use_cache": False}
    return model(input_ids=ids, labels=ids, **arguments).loss
