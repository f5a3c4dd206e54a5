"""X-LoRA: mix trained LoRA experts for each token, by a gate that reads the base model's last hidden states.

    y = W x + g sum_i s_i (B_i A_i x),  s = softmax(gate(h) / temperature),  h from a first pass without adapters

Buehler and Buehler, 2024, arXiv:2402.07148. Trainable: the gate, and optionally the experts. Not mergeable: s depends
on the input. PEFT 0.21 writes X-LoRA files without the gate; ours hold it under the names that PEFT reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Tensors
from ..core.config import LayerConfig, Name, check_range
from ..core.state import state_of
from ..errors import ConfigError, VeneerError
from ..targets.target import Target
from ..upstream import cache as caches
from .families.experts import Expert, build_expert, common_targets, read_expert

INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
"""Arguments of a model call that are passed on to the first pass."""


class Gate(nn.Module):
    """Maps hidden states (batch, length, width) to scalings (batch, length, layers, experts)."""

    def __init__(self, config: XLoraConfig, paths: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.place = {path: i for i, path in enumerate(paths)}
        layers = len(paths) if config.layerwise_scalings else 1
        self.outputs = (layers, len(config.adapters))
        self.internal_xlora_classifier = nn.Module()
        self.internal_xlora_classifier.layers = nn.Sequential(*self.stages())

    def stages(self) -> Iterator[nn.Module]:
        config = self.config
        width = config.hidden_size or 0
        for _ in range(config.xlora_depth - 1):
            yield nn.Linear(width, config.xlora_size)
            yield nn.ReLU()
            if config.xlora_dropout_p > 0:
                yield nn.Dropout(config.xlora_dropout_p)
            width = config.xlora_size
        yield nn.Linear(width, self.outputs[0] * self.outputs[1])

    def forward(self, h: Tensor) -> Tensor:
        logits = self.internal_xlora_classifier.layers(h).unflatten(-1, self.outputs)
        logits = logits.expand(-1, -1, len(self.place), -1)
        if not self.config.enable_softmax:
            return logits
        return (logits / self.config.softmax_temperature).softmax(-1)


class XLoRA(Adapter):
    kinds = frozenset({"linear", "embedding"})

    def __init__(self, config: XLoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.experts = nn.ModuleDict()
        for i, (expert, tensors, _) in enumerate(config.experts):
            lora = build_expert(expert, tensors, target)
            if lora is not None:
                self.experts[str(i)] = lora.requires_grad_(config.use_trainable_adapters)

    def learned(self) -> list[nn.Parameter]:
        if not self.config.use_trainable_adapters:
            return []
        return super().learned()

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        scalings = self.target.fact(self.shared)
        if scalings is None:
            raise VeneerError("X-LoRA needs a call of the whole model, whose hidden states its gate reads")
        layer = self.shared.place[self.target.path]
        s = self.sparse(scalings[:, :, layer])  # (batch, length, experts)
        for i, lora in self.experts.items():
            weight = s[..., int(i)] * self.config.global_scaling_weight
            y = y + lora.term(x) * weight.unsqueeze(-1).to(y.dtype)
        return y

    def sparse(self, s: Tensor) -> Tensor:
        """The scalings (batch, length, experts), with all but the k largest set to zero; renormalised on request."""
        config = self.config
        if config.top_k_lora is not None:
            strongest = s.topk(config.top_k_lora, dim=-1).indices
            mask = torch.zeros_like(s).scatter(-1, strongest, 1.0)
            s = s * mask
        if config.enable_softmax_topk:
            is_zero = s == 0
            logits = s.masked_fill(is_zero, float("-inf"))
            s = logits.softmax(-1).masked_fill(is_zero, 0.0)
        return s

    def export(self) -> Tensors:
        if not self.config.use_trainable_adapters:
            return {}
        return self.state_dict()

    def describe(self) -> str:
        return f"{len(self.experts)} experts"


@dataclass(kw_only=True)
class XLoraConfig(LayerConfig):
    adapters: dict[str, str] = field(default_factory=dict)
    """The experts: for each name, the directory of a trained LoRA adapter."""
    hidden_size: int | None = None
    """Width of the base model's hidden states; None: taken from the model."""
    enable_softmax: bool = True
    """Normalise the scalings of each token so that they sum to one."""
    enable_softmax_topk: bool = False
    """Normalise again after `top_k_lora`."""
    layerwise_scalings: bool = False
    """Compute separate scalings for each layer; False: all layers use the same scalings."""
    xlora_depth: int = 1
    """Number of the gate's linear layers."""
    xlora_size: int = 2048
    """Width of the gate's hidden layers."""
    xlora_dropout_p: float = 0.2
    """Dropout between the gate's layers during training."""
    use_trainable_adapters: bool = False
    """Train the experts too, and save them."""
    softmax_temperature: float = 1.0
    """Temperature of the softmax; below one, the mixture is sharper."""
    top_k_lora: int | None = None
    """Use only the k strongest experts of each token; None: all."""
    scaling_pass_value: float = 0.0
    """Ignored; kept for PEFT compatibility. The first pass runs without adapters."""
    global_scaling_weight: float = 1.0
    """g: strength of the whole mixture."""

    peft_type = Name("XLORA")
    adapter = XLoRA
    path_fields = ("adapters",)
    generate_with = {"use_cache": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.adapters:
            raise ConfigError("X-LoRA mixes trained adapters; name them in `adapters`: {name: directory}")
        check_range(self, 1, 1000, "xlora_depth")
        check_range(self, 1e-6, math.inf, "softmax_temperature")
        if self.top_k_lora is not None:
            check_range(self, 1, len(self.adapters) + 1, "top_k_lora")

    @cached_property
    def experts(self) -> list[Expert]:
        """The trained LoRA adapters, read from their directories once."""
        return [read_expert(name, source, "X-LoRA") for name, source in self.adapters.items()]

    def fill_targets(self, model: nn.Module) -> None:
        # An X-LoRA file has its own check against the base model, in the same layers.
        self.target_modules = common_targets(model, self.experts, check_base=not self.from_file)
        self.hidden_size = self.hidden_size or model.config.get_text_config().hidden_size

    def build_shared(self, targets: Sequence[Target]) -> Gate:
        return Gate(self, [target.path for target in targets])

    def before(self, shared: Gate, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:  # type: ignore[override]
        if caches.is_filled(caches.of_call(kwargs)):
            raise VeneerError("X-LoRA's first pass reads the whole sequence: call generate with use_cache=False")
        inputs = {name: kwargs[name] for name in INPUTS if kwargs.get(name) is not None}
        with torch.no_grad(), state_of(model).switched(enabled=False):  # type: ignore[union-attr]
            h = model.base_model(**inputs, use_cache=False)[0]
        dtype = shared.internal_xlora_classifier.layers[-1].weight.dtype
        facts[shared] = shared(h.to(dtype))

    def to_dict(self) -> dict[str, Any]:
        """Leave out `target_modules`: the experts determine the targets, and PEFT's config has no such field."""
        content = super().to_dict()
        del content["target_modules"]
        return content
