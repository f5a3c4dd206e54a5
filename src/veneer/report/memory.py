"""The memory a training step takes, found by running it on the meta device: tensors have sizes there, but no values.

Every storage that an operation makes is counted while it lives, so the result holds for any architecture and any
method: saved activations, gradients, and the logits and their gradients, which are often the peak.
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

DEEP, SHORT = 8, (2, 4)
"""From so many layers on, this many are run instead."""


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, but for those of a module's own tensors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in (*module.parameters(), *module.buffers()):
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1  # "is nothing packed?" and the like: the usual answer
        out = func(*args, **kwargs or {})
        tree_map_only(Tensor, self._note, out)
        return out

    def _note(self, tensor: Tensor) -> Tensor:
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
    """On the meta device torch would form whole attention matrices, which no real device does."""
    mask = attn_mask.to(q.dtype) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)[0]


def step_peak(model: Any, batch_size: int, length: int) -> int:
    """Bytes at the peak of one forward and backward pass of an adapted model on the meta device.

    The model's own weights are not among them; activations and gradients are. The loss is the model's over all tokens.
    Of a deep stack of layers alike, two short ones are run, and the rest is in proportion.

    Raises:
        RuntimeError: the model or the method looks at values, which the meta device does not have.
    """
    model.train()
    ids = torch.empty(batch_size, length, dtype=torch.long, device="meta")
    fit(model.get_base_model())  # all of its layers, before only some of them are run
    stack = _stack(model.get_base_model())
    if stack is not None:
        try:
            return _in_proportion(model, ids, *stack)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):  # it wants its layers all
            pass
    return _run(model, ids)[0]


def _run(model: Any, ids: Tensor) -> tuple[int, int]:
    """(peak, end) of a step, in bytes; at the end there are the gradients."""
    # no TorchFunctionMode: the backward pass leaves it, and layers that are recomputed there would be without
    with Live(model) as live, patch("torch.nn.functional.scaled_dot_product_attention", _attention):
        _loss(model, ids).backward()
    found = live.peak, live.now
    model.zero_grad(set_to_none=True)
    return found


def _stack(base: nn.Module) -> tuple[nn.Module, str] | None:
    """The parent and the name of the model's one deep list of layers, where all are alike."""
    found = [
        (parent, name)
        for parent in base.modules()
        for name, child in parent.named_children()
        if type(child) is nn.ModuleList and len(child) >= DEEP and len({_shape(layer) for layer in child}) == 1
    ]
    return found[0] if len(found) == 1 else None


def _shape(layer: nn.Module) -> tuple[Any, ...]:
    return type(layer), *((name, p.shape, p.requires_grad) for name, p in layer.named_parameters())


def _in_proportion(model: Any, ids: Tensor, parent: nn.Module, name: str) -> int:
    """The peak of the whole stack, by those of its first layers: activations make it, or, of short rows, gradients."""
    layers = parent.get_submodule(name)
    assert isinstance(layers, nn.ModuleList)
    found = []
    try:
        for few in SHORT:
            setattr(parent, name, layers[:few])
            found.append(_run(model, ids))
    finally:
        setattr(parent, name, layers)
    low, high = SHORT
    return max(a + (b - a) * (len(layers) - low) // (high - low) for a, b in zip(*found, strict=True))


def _loss(model: Any, ids: Tensor) -> Tensor:
    if model.get_base_model().can_generate():
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {"use_cache": False}
        return model(input_ids=ids, labels=ids, **more).loss
    return model(input_ids=ids)[0].float().mean()
