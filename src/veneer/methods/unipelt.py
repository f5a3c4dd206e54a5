"""UniPELT: LoRA, a prefix and bottleneck adapters under one name, each scaled by a learned gate.

    y' = y + g * (what the method adds to y),  g = sigmoid(w h + c) for each token, h: the method's input
    prefix: its keys and values times g,  g = mean over the prompt of sigmoid(w h + c), h: the input of attention

Mao et al., 2022, arXiv:2110.07577. Trainable: the methods, and d + 1 for each gate. Not mergeable. Does not start as a
no-op, because its prefix does not. The paper averages each gate over the whole sequence, so that a causal model sees
ahead and padding counts. Here gates are computed for each token, and the prefix's gate is averaged over the prompt (in
an encoder-decoder it is that of the decoder's first token).
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
    """The gate g = sigmoid(w h + c), (..., 1)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, h: Tensor) -> Tensor:
        logits = (h * self.weight[0]).sum(-1, keepdim=True)
        return (logits + self.bias).sigmoid()


class Gated(Adapter):
    """Another adapter with a gate, which is saved with it as `<method>_gate`."""

    def __init__(self, inner: Adapter) -> None:
        super().__init__(inner.config, inner.target, inner.shared)
        if inner.has_pre or not inner.has_post:
            raise ConfigError(f"UniPELT gates what is added to an output; {inner.config.peft_type} acts elsewhere")
        self.inner = inner
        self.reads_output = isinstance(inner, Bottleneck) and inner.config.placement != "parallel"
        width = self.target.out_features if self.reads_output else self.target.in_features
        self.gate = Gate(width, 1)
        self._prefix = f"{type(inner).__name__.lower()}_gate."

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        g = self.gate(y if self.reads_output else x)
        update = self.inner.post(x, y) - y
        return y + g * update

    def export(self) -> Tensors:
        gate_tensors = {self._prefix + key: tensor for key, tensor in self.gate.state_dict().items()}
        return self.inner.export() | gate_tensors

    def absorb(self, tensors: Tensors) -> None:
        gate_tensors = {}
        for key, tensor in tensors.items():
            if key.startswith(self._prefix):
                gate_tensors[key.removeprefix(self._prefix)] = tensor
        self.inner.absorb(tensors)
        self.gate.load_state_dict(gate_tensors, strict=False, assign=self.gate.weight.is_meta)

    def expected_parameters(self) -> int:
        return self.inner.expected_parameters() + self.gate.in_features + 1


class PrefixGate(Adapter):
    """An adapter of an attention block that scales the prefix in the layer's cache before attention reads it."""

    kinds = frozenset({"block"})

    def __init__(self, config: PrefixGates, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.prefix_gate = Gate(target.in_features, 1)

    def pre(self, x: Tensor) -> Tensor:
        facts = self.target.layer.state.facts
        cache = facts.get("filled")
        if cache is not None:
            g = self.mean_gate(x, facts.get("prefix prompts"))
            layers = getattr(cache, "self_attention_cache", cache).layers
            index = self.config.paths.index(self.target.path)
            layer = layers[index]
            layer.keys = layer.keys * g.to(layer.keys.dtype)
            layer.values = layer.values * g.to(layer.values.dtype)
        return x

    def mean_gate(self, x: Tensor, prompts: Tensor | None) -> Tensor:
        """The mean gate over the prompt of each row of x, (rows, 1, 1, 1)."""
        is_prompt = within(prompts, x).to(x.dtype)[..., None]
        gates = self.prefix_gate(x) * is_prompt
        mean = gates.sum(1) / is_prompt.sum(1).clamp_min(1)
        return mean[..., None, None]


@dataclass(kw_only=True)
class PrefixGates(LayerConfig):
    """The gates of the prefix, on every self-attention block of the model."""

    peft_type = Name("UNIPELT")
    adapter = PrefixGate
    facts = ("prompt_lengths",)

    def fill_targets(self, model: nn.Module) -> None:
        self.paths = self_attention(model)
        self.target_modules = list(self.paths)

    def before(self, shared: nn.Module | None, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            facts["prefix prompts"] = None
        else:
            facts["prefix prompts"] = prompts_of(model, kwargs, facts.get("prompt_lengths"))


@dataclass(kw_only=True)
class UniPELTConfig(UnionConfig):
    """The default `configs`: LoRA (r=8, alpha=2), a prefix of 10 positions, and bottlenecks with a reduction of 16."""

    peft_type = Name("UNIPELT")
    adapter = UnionConfig.adapter

    def __post_init__(self) -> None:
        if not self.configs:
            lora = LoraConfig(r=8, lora_alpha=2)
            prefix = PrefixTuningConfig(num_virtual_tokens=10, prefix_projection=True, encoder_hidden_size=512)
            bottleneck = SeqBnConfig(reduction_factor=16)
            self.configs = [lora, prefix, bottleneck]
        super().__post_init__()
        has_prefix = any(isinstance(config, PrefixTuningConfig) for config in self.configs)
        self.derived = [PrefixGates()] if has_prefix else []

    def join(self, adapter: Adapter) -> Adapter:
        if isinstance(adapter, PrefixGate):
            return adapter
        return Gated(adapter)
