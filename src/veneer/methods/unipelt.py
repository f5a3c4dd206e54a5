"""UniPELT: LoRA, a prefix and bottleneck adapters under one name, each with a learned gate on how much it adds.

    y' = y + g * (what the method adds to y),  g = sigmoid(w h + c) for each token, h what the method reads
    prefix: its keys and values times g,  g = mean over the prompt of sigmoid(w h + c), h what attention reads

Mao et al., 2022, arXiv:2110.07577. Trainable: the methods and d + 1 for each gate. Not mergeable. Does not start as a
no-op, as its prefix does not. The paper's gates are means over the whole sequence, by which a causal model sees ahead
and padding counts; ours are for each token, the prefix's over the prompt (under an encoder: the decoder's first token).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.adapter import Adapter, Tensors
from ..core.config import LayerConfig, Name
from ..errors import ConfigError
from ..maths.positions import within
from ..targets.roles import self_attention
from ..targets.target import Target
from ..upstream.positions import prompts_of
from .families.bottleneck import Bottleneck
from .lora import LoraConfig
from .prefix_tuning import PrefixTuningConfig
from .seq_bn import SeqBnConfig
from .union import UnionConfig


class Gate(nn.Linear):
    """sigmoid(w h + c)"""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, h: Tensor) -> Tensor:
        return ((h * self.weight[0]).sum(-1, keepdim=True) + self.bias).sigmoid()


class Gated(Adapter):
    """Another adapter and its gate, which is saved beside it as `<method>_gate`."""

    def __init__(self, inner: Adapter) -> None:
        super().__init__(inner.config, inner.target, inner.shared)
        if inner.has_pre or not inner.has_post:
            raise ConfigError(f"UniPELT gates what is added to an output; {inner.config.peft_type} acts elsewhere")
        self.inner = inner
        self.reads_output = isinstance(inner, Bottleneck) and inner.config.placement != "parallel"
        self.gate = Gate(self.target.out_features if self.reads_output else self.target.in_features, 1)
        self._key = f"{type(inner).__name__.lower()}_gate."

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.gate(y if self.reads_output else x) * (self.inner.post(x, y) - y)

    def export(self) -> Tensors:
        return self.inner.export() | {self._key + key: tensor for key, tensor in self.gate.state_dict().items()}

    def absorb(self, tensors: Tensors) -> None:
        own = {key.removeprefix(self._key): t for key, t in tensors.items() if key.startswith(self._key)}
        self.inner.absorb(tensors)
        self.gate.load_state_dict(own, strict=False, assign=self.gate.weight.is_meta)

    def expected_parameters(self) -> int:
        return self.inner.expected_parameters() + self.gate.in_features + 1


class PrefixGate(Adapter):
    """Stands before an attention block, and scales the prefix in its layer of the cache, once it is filled."""

    kinds = frozenset({"block"})

    def __init__(self, config: PrefixGates, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.prefix_gate = Gate(target.in_features, 1)

    def pre(self, x: Tensor) -> Tensor:
        facts = self.target.layer.state.facts
        filled, found = facts.get("filled"), facts.get("prefix prompts")
        if filled is not None:
            counted = within(found, x).to(x.dtype)[..., None]
            g = (self.prefix_gate(x) * counted).sum(1) / counted.sum(1).clamp_min(1)
            layers = getattr(filled, "self_attention_cache", filled).layers
            layer, g = layers[self.config.paths.index(self.target.path)], g[..., None, None]
            layer.keys, layer.values = layer.keys * g.to(layer.keys.dtype), layer.values * g.to(layer.values.dtype)
        return x


@dataclass(kw_only=True)
class PrefixGates(LayerConfig):
    """The gates of the prefix; their places follow from the model."""

    peft_type, adapter, facts = Name("UNIPELT"), PrefixGate, ("prompt_lengths",)

    def fill_targets(self, model: nn.Module) -> None:
        self.paths = self_attention(model)
        self.target_modules = list(self.paths)

    def before(self, shared: nn.Module | None, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        seq2seq = getattr(model.config, "is_encoder_decoder", False)
        facts["prefix prompts"] = None if seq2seq else prompts_of(model, kwargs, facts.get("prompt_lengths"))


@dataclass(kw_only=True)
class UniPELTConfig(UnionConfig):
    """Without `configs`: 10 positions, sequential adapters with a reduction of 16, LoRA with r = 8 and alpha = 2."""

    peft_type, adapter = Name("UNIPELT"), UnionConfig.adapter

    def __post_init__(self) -> None:
        if not self.configs:
            prefix = PrefixTuningConfig(num_virtual_tokens=10, prefix_projection=True, encoder_hidden_size=512)
            self.configs = [LoraConfig(r=8, lora_alpha=2), prefix, SeqBnConfig(reduction_factor=16)]
        super().__post_init__()
        self.derived = [PrefixGates()] if any(isinstance(c, PrefixTuningConfig) for c in self.configs) else []

    def join(self, adapter: Adapter) -> Adapter:
        return adapter if isinstance(adapter, PrefixGate) else Gated(adapter)
