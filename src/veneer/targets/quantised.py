"""Targets for linear layers with a quantised weight: one small class per quantisation library.

The weight is dequantised when a method reads it, and quantised again when an adapter is merged. The layer keeps the
old weight, so `unmerge` is bit-exact. A library is recognised by the attributes of its modules.
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
"""A merge that loses more than this share of the update to rounding gives a warning."""


class QuantisedTarget(LinearTarget):
    """A quantised linear layer of any library. Adapters that do not read the weight work on it as it is."""

    is_quantised = True
    is_readable = False
    forwards = ()
    rounded: tuple[float, float] | None = None
    """(norm of the update, norm of the rounding error) of the last merge."""

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether this class is the target for `module`."""
        if type(module).__name__ not in OPAQUE:
            return False
        in_features = getattr(module, "in_features", None)
        out_features = getattr(module, "out_features", None)
        return isinstance(in_features, int) and isinstance(out_features, int)

    @staticmethod
    def keep_gradients_(module: Any) -> None:
        """Keep a module from switching to products that pass no gradients on."""

    def as_matrix(self, weight: Any) -> Tensor:
        """The (out, in) matrix of a quantised weight that `bound` returned."""
        kind = type(self.base).__name__
        raise NotMergeable(
            f"{self.path!r}: the weight of a {kind} cannot be read; use a method that does not read the weight"
        )

    def quantised(self, W: Tensor) -> Any:
        """Quantise an (out, in) matrix with the settings of the current weight; the result goes to `bind`."""
        kind = type(self.base).__name__
        raise NotMergeable(
            f"{self.path!r}: a merged weight cannot be quantised as a {kind} again; merge into the unquantised model, "
            "or keep the adapter unmerged"
        )

    def bound(self, module: Any) -> Any:
        """The quantised weight of a module, in a form that can be kept and bound again."""
        return module._parameters.get("weight")

    def bind(self, module: Any, weight: Any) -> None:
        """Set the quantised weight of a module: the inverse of `bound`."""
        module._parameters["weight"] = weight

    @property
    def in_features(self) -> int:
        return self.base.in_features

    def matrix_of(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        if isinstance(module, nn.Linear) and type(module) is nn.Linear and not self.fits(module):
            return super().matrix_of(module)  # a trained copy is a plain linear layer
        return self.as_matrix(self.bound(module)), getattr(module, "bias", None)

    def copy(self) -> nn.Module:
        """A trainable copy: a plain linear layer."""
        W, b = self.matrix_of(self.base)
        plain = nn.Linear(self.in_features, self.out_features, b is not None, device=W.device, dtype=W.dtype)
        tensors = {"weight": W}
        if b is not None:
            tensors["bias"] = b
        plain.load_state_dict(tensors)
        return plain

    def replace(self, new: dict[str, Tensor]) -> dict[str, Any]:
        old = {"weight": self.bound(self.base)}
        W_before = self.weight()
        bound = {"weight": self.quantised(new["weight"])}
        if "bias" in new:
            old["bias"] = self.base.bias
            bound["bias"] = nn.Parameter(new["bias"].to(self.base.bias.dtype), requires_grad=False)
        self.restore(bound)
        W = new["weight"].detach()
        change = float((W - W_before).norm())
        error = float((self.weight() - W).norm())
        self.rounded = change, error
        return old

    def restore(self, old: dict[str, Any]) -> None:
        if "weight" in old:
            self.bind(self.base, old["weight"])
        if "bias" in old:
            is_parameter = "bias" in self.base._parameters
            attributes = self.base._parameters if is_parameter else self.base.__dict__
            attributes["bias"] = old["bias"]

    def parameters(self) -> dict[str, Any]:
        weight = self.bound(self.base)
        bias = getattr(self.base, "bias", None)
        tensors = {"weight": weight, "bias": bias}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def call_with(self, module: nn.Module, tensors: dict[str, Any], args: Any, kwargs: Any) -> Any:
        if module is not self.base:
            return module(*args, **kwargs)
        current = self.parameters()
        self.restore(tensors)
        try:
            return module(*args, **kwargs)
        finally:
            self.restore(current)


OPAQUE = ("EetqLinear", "QuantizedLinear", "HiggsLinear", "SpQRLinear", "VPTQLinear", "BitLinear", "AutoBitLinear")
"""Class names of quantised linear layers (EETQ, AQLM, ...) that have no method for reading their weight."""


class BitsAndBytes4(QuantisedTarget):
    """bitsandbytes' NF4 and FP4."""

    is_readable = True

    @staticmethod
    def fits(module: Any) -> bool:
        return type(module).__name__ == "Linear4bit" and getattr(module.weight, "quant_state", None) is not None

    @staticmethod
    def keep_gradients_(module: Any) -> None:
        """In evaluation, bitsandbytes packs the weight for good on CPUs with AVX-512 BF16."""
        from bitsandbytes import functional

        module.support_avx512bf16_for_cpu = False
        weight = module.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            weight.data, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
            weight.quant_state = module.quant_state = state

    def as_matrix(self, weight: Any) -> Tensor:
        from bitsandbytes import functional

        data = weight.data
        state = weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):  # a forward pass on some CPUs packs the weight
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
            if not state.nested:  # absmax stays as it was packed: (blocks of a row, rows) in bfloat16
                state.absmax = state.absmax.T.reshape(-1).float()
        return functional.dequantize_4bit(data, state)

    def quantised(self, W: Tensor) -> Any:
        old = self.bound(self.base)
        new = type(old)(
            W.to("cpu", self.dtype),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        )
        return new.to(old.device)

    def bind(self, module: Any, weight: Any) -> None:
        super().bind(module, weight)
        module.quant_state = weight.quant_state

    @property
    def dtype(self) -> torch.dtype | None:
        state = self.bound(self.base).quant_state
        return getattr(state, "original_dtype", state.dtype)


class BitsAndBytes8(QuantisedTarget):
    """bitsandbytes' LLM.int8(). A forward pass moves the numbers to the module's `state`; `bound` moves them back."""

    is_readable = True

    @staticmethod
    def fits(module: Any) -> bool:
        return type(module).__name__ == "Linear8bitLt" and not module.state.has_fp16_weights

    def as_matrix(self, weight: Any) -> Tensor:
        return weight.data * (weight.SCB / 127)[:, None]

    def quantised(self, W: Tensor) -> Any:
        old = self.bound(self.base)
        new = type(old)(W.to("cpu"), requires_grad=False, has_fp16_weights=False)
        return new.to(old.device)

    def bound(self, module: Any) -> Any:
        weight = module._parameters["weight"]
        if weight.CB is None:
            weight.CB = module.state.CB
            weight.SCB = module.state.SCB
        return weight

    def bind(self, module: Any, weight: Any) -> None:
        self.bound(module)  # the old weight gets its numbers back before it is replaced
        super().bind(module, weight)
        module.state = copy.copy(module.state)
        module.state.CB = None
        module.state.SCB = None


class TorchAO(QuantisedTarget):
    """torchao: the weight is a tensor subclass with a `dequantize` method."""

    is_readable = True

    @staticmethod
    def fits(module: Any) -> bool:
        weight = getattr(module, "weight", None)
        return type(weight).__module__.partition(".")[0] == "torchao" and hasattr(weight, "dequantize")

    def as_matrix(self, weight: Any) -> Tensor:
        return weight.dequantize()

    def quantised(self, W: Tensor) -> Any:
        old = self.bound(self.base)
        from_hp: Any = getattr(type(old), "from_hp", None)
        if from_hp is None:
            return super().quantised(W)
        arguments = inspect.signature(from_hp).parameters
        quantises_activations = getattr(old, "act_quant_kwargs", None) is not None
        if "block_size" in arguments:
            new = from_hp(W, list(old.block_size))
        elif "granularity" in arguments and not quantises_activations:
            new = from_hp(W, _granularity(old.block_size, W.shape))
        else:
            return super().quantised(W)
        return nn.Parameter(new, requires_grad=False)


def _granularity(block: Any, shape: torch.Size) -> Any:
    """The torchao granularity for a block shape and a weight shape."""
    from torchao.quantization import PerGroup, PerRow, PerTensor

    if tuple(block) == tuple(shape):
        return PerTensor()
    if block[-1] == shape[-1]:
        return PerRow()
    return PerGroup(block[-1])


class HQQ(QuantisedTarget):
    """Half-quadratic quantisation. `bound` returns the packed weight and its metadata."""

    is_readable = True

    @staticmethod
    def fits(module: Any) -> bool:
        return type(module).__name__ == "HQQLinear"

    def as_matrix(self, weight: Any) -> Tensor:
        current = self.bound(self.base)
        self.bind(self.base, weight)
        try:
            return self.base.dequantize()
        finally:
            self.bind(self.base, current)

    def quantised(self, W: Tensor) -> Any:
        plain = nn.Linear(self.in_features, self.out_features, bias=False)
        plain.weight = nn.Parameter(W, requires_grad=False)
        base = self.base
        settings = {"offload_meta": False, **base.quant_config}  # HQQ's constructor removes offload_meta
        new = type(base)(plain, settings, compute_dtype=base.compute_dtype, device=str(base.device))
        return self.bound(new)

    def bound(self, module: Any) -> Any:
        return module.W_q, module.meta

    def bind(self, module: Any, weight: Any) -> None:
        module.W_q, module.meta = weight

    @property
    def dtype(self) -> torch.dtype | None:
        return self.base.compute_dtype


class GPTQ(QuantisedTarget):
    """gptqmodel's GPTQ and AWQ layers. Their weight can be read but not written."""

    is_readable = True

    @staticmethod
    def fits(module: Any) -> bool:
        return hasattr(module, "qweight") and hasattr(module, "dequantize_weight")

    def bound(self, module: Any) -> Any:
        return module

    def as_matrix(self, weight: Any) -> Tensor:
        return weight.dequantize_weight().T


class Gguf(QuantisedTarget):
    """transformers' linear layer over the blocks of a GGUF file."""

    is_readable = True

    @staticmethod
    def fits(module: Any) -> bool:
        return type(module).__name__ == "GgufLinear"

    def as_matrix(self, weight: Any) -> Tensor:
        from gguf import dequantize

        blocks = weight.detach().cpu().numpy()
        stored = torch.from_numpy(dequantize(blocks, self._type())).to(weight.device)
        places = self.base.input_permutation
        if places is None:
            return stored
        W = torch.empty_like(stored)
        W[:, places] = stored
        return W

    def quantised(self, W: Tensor) -> Any:
        from gguf import quantize

        places = self.base.input_permutation
        stored = W if places is None else W[:, places]
        try:
            blocks = quantize(stored.detach().float().cpu().contiguous().numpy(), self._type())
        except NotImplementedError:  # K-quants
            return super().quantised(W)
        old = self.bound(self.base)
        return nn.Parameter(torch.from_numpy(blocks).to(old.device), requires_grad=False)

    def _type(self) -> Any:
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(self.base.ggml_type)


BACKENDS = (BitsAndBytes4, BitsAndBytes8, TorchAO, HQQ, GPTQ, Gguf, QuantisedTarget)


def lost_to_rounding(layers: Iterable[Any]) -> float | None:
    """The rounding error of the last merge as a share of the update; None if no weight that was merged is quantised."""
    rounded = [layer.target.rounded for layer in layers if layer.target.is_quantised and layer.merged_adapters]
    if not rounded:
        return None
    changes, errors = zip(*rounded, strict=True)
    return math.hypot(*errors) / max(math.hypot(*changes), 1e-30)


def warn_of_rounding(layers: Iterable[Any]) -> None:
    """Warn if merging into quantised weights lost much of the update to rounding."""
    lost = lost_to_rounding(layers)
    if lost is not None and lost > LARGE:
        warnings.warn(
            f"quantising the merged weights again causes an error of {lost:.0%} of the update: changes "
            "smaller than a quantisation step vanish. Keep the adapter unmerged, or merge it into the unquantised base "
            "model, for which the same adapter file can be used",
            RoundingWarning,
            stacklevel=4,
        )


def keep_gradients_(model: nn.Module) -> None:
    """Make every quantised layer pass gradients on, also after an evaluation, for the layers before it."""
    for module in model.modules():
        backend = quantised(module)
        if backend is not None:
            backend.keep_gradients_(module)


def quantised(module: nn.Module) -> type[QuantisedTarget] | None:
    """The target class for a quantised linear layer, None for any other module."""
    for backend in BACKENDS:
        if backend.fits(module):
            return backend
    return None
