"""ShadowPEFT: a small network runs alongside the model and corrects the input of each block.

    s_0 = P shadow(x),    h'_l = h_l + alpha W_up W_down dropout(h_l - s_l),    y_l = block_l(h'_l)
    s_{l+1} = (1 - g) s_l + g T_l(y_l),    g = sigmoid(G_l(y_l));  T, G: two layers with GELU between

Li et al., 2026, arXiv:2604.19254. Trainable: the shadow, and r x 2 d + 2 (2 d u + d + u) per block of width d; the last
block's T and G are in the file but have no effect. Not mergeable: the correction depends on the input. Starts as a
no-op. In training, the loss of the model's head on s_0 is added to the model's loss (in PEFT it always is). In the
cache, the shadow's entries follow those of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name, TaskType, check_range
from ..errors import ConfigError, TargetError, VeneerError
from ..targets.roles import blocks
from ..targets.target import Target
from ..upstream import cache as caches
from .families.side_network import classification_loss, config_of, freeze_, language_loss, last_position, mirror, saved

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
"""The sizes of a mirror that the config can set, without the prefix `shadow_`."""
PASSED_ON = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
"""Arguments of a model call that are also passed to the shadow."""


class Network(nn.Module):
    """The shadow network, shared by all blocks."""

    def __init__(self, config: ShadowConfig, targets: Sequence[Target]) -> None:
        super().__init__()
        base = config_of(targets[0].base)
        if base is None or getattr(base, "is_encoder_decoder", False):
            raise TargetError(f"{targets[0].path!r} is not a block of a transformers decoder, which a shadow needs")
        self.place = {target.path: i for i, target in enumerate(targets)}
        self.layers_before = base.num_hidden_layers
        is_mirror = config.shadow_model == "mirror"
        projection: nn.Module | None = None
        if is_mirror:
            backbone = mirror(base, config.sizes())
        else:
            backbone, projection = saved(config.shadow_model)
        width = backbone.config.hidden_size
        d = base.hidden_size
        self.reads_embeddings = is_mirror and config.share_embeddings and width == d
        if self.reads_embeddings and hasattr(backbone, "embed_tokens"):
            del backbone.embed_tokens
        elif self.reads_embeddings or not is_mirror:
            freeze_(backbone.get_input_embeddings())
        if projection is None:
            projection = nn.Identity() if width == d else nn.Linear(width, d, bias=False)
        self.shadow_backbone = nn.ModuleDict({"default": backbone})
        self.shadow_projection = nn.ModuleDict({"default": projection})
        if config.task_type == TaskType.SEQ_CLS:
            head = nn.Linear(d, base.num_labels, bias=False)
            self.shadow_head = nn.ModuleDict({"default": head})

    def forward(self, model: Any, kwargs: dict[str, Any]) -> Tensor:
        """s_0 for the input of a model call, (batch, length, d)."""
        backbone = self.shadow_backbone["default"]
        inputs = {name: kwargs[name] for name in PASSED_ON if kwargs.get(name) is not None}
        model_cache = caches.of_call(kwargs)
        cache = caches.part_of(model_cache, self, self.layers_before, backbone.config)
        if self.reads_embeddings and "inputs_embeds" not in inputs:
            embedding = model.get_input_embeddings()
            inputs["inputs_embeds"] = embedding(inputs.pop("input_ids"))
        if "inputs_embeds" in inputs:
            dtype = next(backbone.parameters()).dtype
            inputs["inputs_embeds"] = inputs["inputs_embeds"].to(dtype)
        if cache is not None:
            inputs = caches.with_cache(inputs, caches.argument(backbone), cache)
        output = backbone(**inputs, use_cache=cache is not None)
        return self.shadow_projection["default"](output.last_hidden_state)

    def loss(self, s: Tensor, model: Any, kwargs: dict[str, Any]) -> Tensor:
        """The task's loss if the prediction is made from the shadow's state s alone."""
        labels = kwargs["labels"]
        if not hasattr(self, "shadow_head"):
            return language_loss(model.get_output_embeddings(), s, labels)
        last = last_position(s, kwargs.get("attention_mask"))
        logits = self.shadow_head["default"](last)
        return classification_loss(logits, labels)


class Shadow(Adapter):
    kinds = frozenset({"block"})

    def __init__(self, config: ShadowConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        d = target.in_features
        u = config.update_hidden_size or config.r
        self.place = self.shared.place[target.path]
        down = nn.Linear(d, config.r, bias=False)
        up = nn.Linear(config.r, d, bias=False)
        self.shadow_down = nn.ModuleDict({"default": down})
        self.shadow_up = nn.ModuleDict({"default": up})
        self.is_last = self.place == len(self.shared.place) - 1
        self.shadow_update_transform = self._two_layers(d, u)
        self.shadow_update_gate = self._two_layers(d, u)
        self.dropout = nn.Dropout(config.shadow_dropout)
        if config.init_weights:
            nn.init.zeros_(up.weight)

    def _two_layers(self, d: int, u: int) -> nn.ModuleDict:
        """T or G; frozen in the last block, where they have no effect."""
        first = nn.Linear(d, u)
        second = nn.Linear(u, d)
        layers = nn.Sequential(first, nn.GELU(), second)
        if self.is_last:
            freeze_(layers)
        return nn.ModuleDict({"default": layers})

    def pre(self, x: Tensor) -> Tensor:
        s = self.shadow_state()
        if s.shape[1] != x.shape[1]:
            raise VeneerError(f"the shadow saw {s.shape[1]} positions, {self.target.path!r} {x.shape[1]}")
        narrow = self.shadow_down["default"](self.dropout(x - s))
        return x + self.config.shadow_alpha * self.shadow_up["default"](narrow)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.is_last:
            self.update_shadow(y)
        # A view that is created after s gets its gradient before s, so that FSDP gathers the weights for both.
        return y.view_as(y)

    def update_shadow(self, y: Tensor) -> None:
        """Store the shadow's state for the next block."""
        s = self.shadow_state()
        gate = self.shadow_update_gate["default"](y).sigmoid()
        s = (1 - gate) * s + gate * self.shadow_update_transform["default"](y)
        facts = self.target.layer.state.facts
        rows = self.target.layer.rows
        if rows is not None:  # in a mixed batch, other rows get a placeholder of this shape, never read
            s = facts[self.shared, 0].to(s).index_copy(0, rows, s)
        facts[self.shared, self.place + 1] = s

    def shadow_state(self) -> Tensor:
        """s_l: the shadow's state at this block, for the rows that are being computed."""
        s = self.target.fact((self.shared, self.place))
        if s is None:
            raise VeneerError("a shadow needs a call of the whole model, whose input it reads")
        return s.to(self.dtype)

    def expected_parameters(self) -> int:
        d = self.target.in_features
        r = self.config.r
        u = self.config.update_hidden_size or r
        correction = 2 * d * r
        if self.is_last:
            return correction
        return correction + 2 * (2 * d * u + d + u)

    def describe(self) -> str:
        return f"r={self.config.r}"


@dataclass(kw_only=True)
class ShadowConfig(LayerConfig):
    r: int = 8
    """Rank of the correction."""
    shadow_alpha: float = 0.1
    """alpha: strength of the correction."""
    shadow_dropout: float = 0.2
    """Dropout on the difference between the input and the shadow during training."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""
    shadow_model: str = "mirror"
    """"mirror": a new network of the model's architecture; otherwise the directory of a model or a projected shadow."""
    shadow_num_hidden_layers: int | None = None
    """Number of the mirror's layers; None: one."""
    shadow_hidden_size: int | None = None
    """Width of the mirror; None: the model's."""
    shadow_num_attention_heads: int | None = None
    """Number of the mirror's attention heads; None: the model's."""
    shadow_intermediate_size: int | None = None
    """Width of the mirror's MLP; None: the model's."""
    share_embeddings: bool = True
    """Whether the mirror uses the model's input embeddings, which requires the same width."""
    update_hidden_size: int | None = None
    """u: width of the hidden layer of T and G; None: r."""
    auxiliary_loss_weight: float = 0.05
    """Weight of the shadow's own loss."""

    peft_type = Name("SHADOW")
    adapter = Shadow
    changes_call = True
    learning_rate = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "update_hidden_size")
        for name in SIZES:
            check_range(self, 1, math.inf, f"shadow_{name}")
        check_range(self, 1, 1000, "shadow_num_hidden_layers")
        check_range(self, 0, 1, "shadow_dropout")
        check_range(self, 0, math.inf, "auxiliary_loss_weight")
        if self.shadow_model != "mirror" and any(self.sizes().values()):
            raise ConfigError(
                f"the shadow_* sizes are the mirror's, and {self.shadow_model!r} has its own; got {self.sizes()}"
            )

    def sizes(self) -> dict[str, int | None]:
        """The mirror's sizes, by the names in a model's config."""
        return {name: getattr(self, f"shadow_{name}") for name in SIZES}

    def fill_targets(self, model: nn.Module) -> None:
        self.target_modules = blocks(model)

    def build_shared(self, targets: Sequence[Target]) -> Network:
        return Network(self, targets)

    def before(self, shared: Any, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        s = shared(model, kwargs)
        facts[shared, 0] = s
        has_loss = self.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_CLS) and self.auxiliary_loss_weight > 0
        if has_loss and torch.is_grad_enabled() and kwargs.get("labels") is not None:
            facts[shared, "loss"] = shared.loss(s, model, kwargs)

    def loss(self, adapters: Sequence[Adapter]) -> Tensor | None:
        shadow = next(adapter for adapter in adapters if isinstance(adapter, Shadow))
        term = shadow.target.fact((shadow.shared, "loss"))
        if term is None:
            return None
        return self.auxiliary_loss_weight * term
