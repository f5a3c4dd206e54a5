"""Quantising a base model while it is loaded: which library does it, its options, and the size of a layer.

nf4 and int8 are bitsandbytes', through transformers. int4 is HQQ's, applied to the loaded model: transformers 5 cannot
load with HQQ, and torchao 0.18 has no 4-bit weights for CPUs (it holds each in 8 bits, or needs a GPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import ConfigError, first_line, nearest

HEADS = ("score", "classifier")
"""The names that transformers uses for a classifier's head, which is trained and stays as it is."""
BLOCK = 64
"""Weights that share a scale, in bitsandbytes' nf4 and by default in HQQ."""

PACKED = 32
"""Output features that bitsandbytes packs together on CPUs with AVX-512 BF16."""


@dataclass(frozen=True)
class Quantisation:
    """How the linear layers of a base model are quantised, except for its head."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """The library's own options."""

    scheme: ClassVar[str]
    library: ClassVar[str]
    known: ClassVar[tuple[str, ...]]
    """The names of the options."""
    skipping: ClassVar[str]
    """The option that names modules to leave as they are."""

    def as_dict(self) -> dict[str, Any]:
        """The scheme and the options, as an adapter's file records them."""
        return {"scheme": self.scheme, "options": dict(self.options)}

    def arguments(self, dtype: torch.dtype, is_classifier: bool) -> dict[str, Any]:
        """Arguments of `from_pretrained`, for a base model that computes in `dtype`."""
        return {}

    def convert_(self, model: Any, dtype: torch.dtype) -> None:
        """Quantise a model that `from_pretrained` has returned, if that did not."""

    def stored_bytes(self, in_features: int, out_features: int, dtype: torch.dtype) -> int:
        """The size of a quantised weight."""
        raise NotImplementedError  # every subclass defines it

    def layers(self, model: Any) -> Iterator[tuple[str, nn.Linear]]:
        """The layers of an unquantised model that are quantised, by path."""
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        skipped = self.options.get(self.skipping) or ()
        for path, module in model.named_modules():
            is_head = module is head or not set(HEADS).isdisjoint(path.split("."))
            is_skipped = any(path == name or path.endswith(f".{name}") for name in skipped)
            if type(module) is nn.Linear and not is_head and not is_skipped:
                yield path, module


class _BitsAndBytes(Quantisation):
    library = "bitsandbytes"
    skipping = "llm_int8_skip_modules"

    def arguments(self, dtype: torch.dtype, is_classifier: bool) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        options = self._defaults(dtype) | dict(self.options)
        if is_classifier:
            options[self.skipping] = [*HEADS, *(self.options.get(self.skipping) or ())]
        try:
            return {"quantization_config": BitsAndBytesConfig(**options)}
        except (TypeError, ValueError, AttributeError) as error:  # AttributeError for an unknown name of a dtype
            raise ConfigError(f"quantise_options {dict(self.options)!r}: {first_line(error)}") from None

    def _defaults(self, dtype: torch.dtype) -> dict[str, Any]:
        raise NotImplementedError  # both subclasses define it


class NF4(_BitsAndBytes):
    """4 bits in blocks of 64, with 16 levels placed for normally distributed weights (QLoRA)."""

    scheme = "nf4"
    known = (
        "bnb_4bit_compute_dtype",
        "bnb_4bit_use_double_quant",
        "bnb_4bit_quant_storage",
        "llm_int8_skip_modules",
    )

    def _defaults(self, dtype: torch.dtype) -> dict[str, Any]:
        return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}

    def convert_(self, model: Any, dtype: torch.dtype) -> None:
        for module in model.modules():
            if type(module).__name__ == "Linear4bit" and module.out_features % PACKED:
                module.support_avx512bf16_for_cpu = False  # packing fails on other sizes, in the first evaluation

    def stored_bytes(self, in_features: int, out_features: int, dtype: torch.dtype) -> int:
        weights = in_features * out_features
        blocks = weights // BLOCK
        is_double = self.options.get("bnb_4bit_use_double_quant", False)
        scales = blocks + 4 * blocks // 256 if is_double else 4 * blocks  # scales in 8 bits, or in fp32
        return weights // 2 + scales


class Int8(_BitsAndBytes):
    """8 bits with a scale for each row (LLM.int8())."""

    scheme = "int8"
    known = ("llm_int8_threshold", "llm_int8_skip_modules")

    def _defaults(self, dtype: torch.dtype) -> dict[str, Any]:
        return {"load_in_8bit": True}

    def stored_bytes(self, in_features: int, out_features: int, dtype: torch.dtype) -> int:
        return in_features * out_features + 4 * out_features


class Int4(Quantisation):
    """4 bits in groups of 64, with zero points fitted to the weights (HQQ)."""

    scheme = "int4"
    library = "hqq"
    known = ("group_size", "axis", "optimize", "skip_modules")
    skipping = "skip_modules"

    def convert_(self, model: Any, dtype: torch.dtype) -> None:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        options = {name: self.options[name] for name in ("group_size", "axis") if name in self.options}
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        for path, layer in list(self.layers(model)):
            parent = model.get_submodule(path.rpartition(".")[0])
            try:
                config = BaseQuantizeConfig(nbits=4, **options)
                config["weight_quant_params"]["optimize"] = self.options.get("optimize", True)
                converted = HQQLinear(layer, config, compute_dtype=dtype, device=str(device))
            except (AssertionError, TypeError, RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"{path!r} cannot be quantised to int4 with {dict(self.options)!r}: {first_line(error)}"
                ) from None
            parent._modules[path.rpartition(".")[2]] = converted

    def stored_bytes(self, in_features: int, out_features: int, dtype: torch.dtype) -> int:
        weights = in_features * out_features
        groups = weights // (self.options.get("group_size") or BLOCK)
        return weights // 2 + 2 * groups * dtype.itemsize  # a scale and a zero point for each group


SCHEMES: dict[str, Callable[[Mapping[str, Any]], Quantisation]] = {"nf4": NF4, "int8": Int8, "int4": Int4}


def quantisation(scheme: str | None, options: Mapping[str, Any] | None = None) -> Quantisation | None:
    """The quantisation of a name; None for none.

    Raises:
        ConfigError: the scheme or an option is unknown, or the library is not installed.
    """
    if scheme is None:
        return None
    if scheme not in SCHEMES:
        raise ConfigError(f"quantise = {scheme!r} must be {', '.join(SCHEMES)}{nearest(scheme, SCHEMES)}")
    found = SCHEMES[scheme](dict(options or {}))
    for name in found.options:
        if name not in found.known:
            known = f"{found.library} takes {', '.join(found.known)}{nearest(name, found.known)}"
            raise ConfigError(f"quantise_options has no {name!r} for {scheme}; {known}")
    if find_spec(found.library) is None:
        raise ConfigError(
            f"quantise = {scheme!r} needs {found.library}, which is not installed: pip install {found.library}"
        )
    return found
