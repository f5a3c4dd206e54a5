"""Linear layers whose weight a library keeps quantised: what an adapter sees of each, through that library.

One small class a library. The weight is dequantised when a method looks at it, and quantised again when one is merged:
then the layer keeps the old one, so `unmerge` stays bit-exact. Libraries are known by what their modules look like.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotMergeable, RoundingWarning
from .target import LinearTarget

LARGE = 0.5
"""The share of a merged update that may be lost before there is a warning."""


class QuantisedTarget(LinearTarget):
    """A linear layer that is quantised in some way. Adapters that look at no weight work on it as it is."""

    is_quantised = True
    is_readable = False
    rounded: tuple[float, float] | None = None
    """(size of the change, size of what rounding made of it) when a weight was last merged."""

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether `module` is of this kind."""
        sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
        return all(isinstance(size, int) for size in sizes) and type(module).__name__ in OPAQUE

    def as_matrix(self, weight: Any) -> Tensor:
        """What `bound` gives as (out, in) numbers."""
        kind = type(self.base).__name__
        raise NotMergeable(
            f"{self.path!r}: the weight of a {kind} cannot be read; use a method that does not look at it"
        )

    def quantised(self, W: Tensor) -> Any:
        """What `bind` takes, from (out, in) numbers, with the settings of the present weight."""
        kind = type(self.base).__name__
        raise NotMergeable(
            f"{self.path!r}: a merged weight cannot be quantised into a {kind} again; merge into the model before it "
            "was quantised, or keep the adapter unmerged"
        )

    def bound(self, module: Any) -> Any:
        """A module's quantised weight, fit to be kept."""
        return module._parameters.get("weight")

    def bind(self, module: Any, weight: Any) -> None:
        """The inverse of `bound`."""
        module._parameters["weight"] = weight

    @property
    def in_features(self) -> int:
        return self.base.in_features

    def matrix_of(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        if isinstance(module, nn.Linear) and type(module) is nn.Linear and not self.fits(module):
            return super().matrix_of(module)  # a trained copy
        return self.as_matrix(self.bound(module)), getattr(module, "bias", None)

    def copy(self) -> nn.Module:
        """A trainable copy: a plain linear layer."""
        W, b = self.matrix_of(self.base)
        plain = nn.Linear(self.in_features, self.out_features, b is not None, device=W.device, dtype=W.dtype)
        plain.load_state_dict({"weight": W} | ({} if b is None else {"bias": b}))
        return plain

    def replace(self, new: dict[str, Tensor]) -> dict[str, Any]:
        old, before = {"weight": self.bound(self.base)}, self.weight()
        weight = self.quantised(new["weight"])
        bound = {"weight": weight}
        if "bias" in new:
            old["bias"] = self.base.bias
            bound["bias"] = nn.Parameter(new["bias"].to(self.base.bias.dtype), requires_grad=False)
        self.restore(bound)
        W = new["weight"].detach()
        self.rounded = float((W - before).norm()), float((self.weight() - W).norm())
        return old

    def restore(self, old: dict[str, Any]) -> None:
        if "weight" in old:
            self.bind(self.base, old["weight"])
        if "bias" in old:
            place = self.base._parameters if "bias" in self.base._parameters else self.base.__dict__
            place["bias"] = old["bias"]

    def parameters(self) -> dict[str, Any]:
        found = {"weight": self.bound(self.base), "bias": getattr(self.base, "bias", None)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def call_with(self, module: nn.Module, tensors: dict[str, Any], args: Any, kwargs: Any) -> Any:
        if module is not self.base:
            return module(*args, **kwargs)
        now = self.parameters()
        self.restore(tensors)
        try:
            return module(*args, **kwargs)
        finally:
            self.restore(now)


OPAQUE = ("EetqLinear", "QuantizedLinear", "HiggsLinear", "SpQRLinear", "VPTQLinear", "BitLinear", "AutoBitLinear")
"""Quantised linear layers (EETQ, AQLM, ...) that offer no way to read their weight."""


class BitsAndBytes4(QuantisedTarget):
    """bitsandbytes' NF4 and FP4."""

    is_readable = True

    @staticmethod
    def fits(module: Any) -> bool:
        return type(module).__name__ == "Linear4bit" and getattr(module.weight, "quant_state", None) is not None

    def as_matrix(self, weight: Any) -> Tensor:
        from bitsandbytes import functional

        data, state = weight.data, weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):  # what running on some CPUs leaves
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
            if not state.nested:  # left as the packed form has it: (blocks of a row, rows) in bfloat16
                state.absmax = state.absmax.T.reshape(-1).float()
        return functional.dequantize_4bit(data, state)

    def quantised(self, W: Tensor) -> Any:
        old = self.bound(self.base)
        settings = {
            name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        }
        return type(old)(W.to("cpu", self.dtype), requires_grad=False, **settings).to(old.device)

    def bind(self, module: Any, weight: Any) -> None:
        super().bind(module, weight)
        module.quant_state = weight.quant_state

    @property
    def dtype(self) -> torch.dtype | None:
        state = self.bound(self.base).quant_state
        return getattr(state, "original_dtype", state.dtype)


class BitsAndBytes8(QuantisedTarget):
    """bitsandbytes' LLM.int8(). Its numbers move into the module's `state` when that runs, and back to be kept."""

    is_readable = True

    @staticmethod
    def fits(module: Any) -> bool:
        return type(module).__name__ == "Linear8bitLt" and not module.state.has_fp16_weights

    def as_matrix(self, weight: Any) -> Tensor:
        return weight.data * (weight.SCB / 127)[:, None]

    def quantised(self, W: Tensor) -> Any:
        old = self.bound(self.base)
        return type(old)(W.to("cpu"), requires_grad=False, has_fp16_weights=False).to(old.device)

    def bound(self, module: Any) -> Any:
        weight, state = module._parameters["weight"], module.state
        if weight.CB is None:
            weight.CB, weight.SCB = state.CB, state.SCB
        return weight

    def bind(self, module: Any, weight: Any) -> None:
        self.bound(module)  # the one that leaves takes its numbers along
        super().bind(module, weight)
        module.state = copy.copy(module.state)
        module.state.CB = module.state.SCB = None


class TorchAO(QuantisedTarget):
    """torchao: the weight is a tensor that dequantises itself."""

    is_readable = True

    @staticmethod
    def fits(module: Any) -> bool:
        weight = getattr(module, "weight", None)
        return type(weight).__module__.partition(".")[0] == "torchao" and hasattr(weight, "dequantize")

    def as_matrix(self, weight: Any) -> Tensor:
        return weight.dequantize()

    def quantised(self, W: Tensor) -> Any:
        old = self.bound(self.base)
        make: Any = getattr(type(old), "from_hp", None)
        known = inspect.signature(make).parameters if make is not None else {}
        if "block_size" in known:
            new = make(W, list(old.block_size))
        elif "granularity" in known and getattr(old, "act_quant_kwargs", None) is None:
            new = make(W, _granularity(old.block_size, W.shape))
        else:
            return super().quantised(W)
        return nn.Parameter(new, requires_grad=False)


def _granularity(block: Any, shape: torch.Size) -> Any:
    from torchao.quantization import PerGroup, PerRow, PerTensor

    if tuple(block) == tuple(shape):
        return PerTensor()
    return PerRow() if block[-1] == shape[-1] else PerGroup(block[-1])


class HQQ(QuantisedTarget):
    """Half-quadratic quantisation. What is kept is the packed weight with the notes that belong to it."""

    is_readable = True

    @staticmethod
    def fits(module: Any) -> bool:
        return type(module).__name__ == "HQQLinear"

    def as_matrix(self, weight: Any) -> Tensor:
        now = self.bound(self.base)
        self.bind(self.base, weight)
        try:
            return self.base.dequantize()
        finally:
            self.bind(self.base, now)

    def quantised(self, W: Tensor) -> Any:
        plain = nn.Linear(self.in_features, self.out_features, bias=False)
        plain.weight = nn.Parameter(W, requires_grad=False)
        base, how = self.base, {"offload_meta": False, **self.base.quant_config}  # its constructor takes that out
        return self.bound(type(base)(plain, how, compute_dtype=base.compute_dtype, device=str(base.device)))

    def bound(self, module: Any) -> Any:
        return module.W_q, module.meta

    def bind(self, module: Any, weight: Any) -> None:
        module.W_q, module.meta = weight

    @property
    def dtype(self) -> torch.dtype | None:
        return self.base.compute_dtype


class GPTQ(QuantisedTarget):
    """gptqmodel's layers, GPTQ and AWQ: they can be read, not written."""

    is_readable = True

    @staticmethod
    def fits(module: Any) -> bool:
        return hasattr(module, "qweight") and hasattr(module, "dequantize_weight")

    def bound(self, module: Any) -> Any:
        return module

    def as_matrix(self, weight: Any) -> Tensor:
        return weight.dequantize_weight().T


BACKENDS = (BitsAndBytes4, BitsAndBytes8, TorchAO, HQQ, GPTQ, QuantisedTarget)


def warn_of_rounding(layers: Iterable[Any]) -> None:
    """Say so where merging into quantised weights lost much: what is smaller than their steps vanishes."""
    rounded = [layer.target.rounded for layer in layers if layer.target.is_quantised and layer.merged_adapters]
    change, error = (math.hypot(*sizes) for sizes in zip(*rounded, strict=True)) if rounded else (0.0, 0.0)
    if error > LARGE * change:
        warnings.warn(
            f"the error of quantising the merged weights again is {error / change:.0%} of what was merged: changes "
            "smaller than the steps of a quantised weight vanish. Keep the adapter unmerged, or load the base model "
            "unquantised and merge there, which the adapter's file fits",
            RoundingWarning,
            stacklevel=4,
        )


def quantised(module: nn.Module) -> type[QuantisedTarget] | None:
    """The view of a quantised linear layer, None for any other module."""
    return next((backend for backend in BACKENDS if backend.fits(module)), None)
