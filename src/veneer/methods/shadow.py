"""ShadowPEFT: a small network runs beside the model and corrects the input of each of its blocks.

    s_0 = P shadow(x),    h'_l = h_l + alpha W_up W_down dropout(h_l - s_l),    y_l = block_l(h'_l)
    s_{l+1} = (1 - g) s_l + g T_l(y_l),    g = sigmoid(G_l(y_l));  T, G: two layers with GELU between

Li et al., 2026, arXiv:2604.19254. Trainable: the shadow, and r x 2 d + 2 (2 d u + d + u) a block of width d; the last
block's T and G are in the file but reach nothing. Not mergeable: it depends on the input. Starts as a no-op. To the
loss comes that of the model's head on s_0, in training (PEFT: always). The shadow's cache lies behind the model's.
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
PASSED_ON = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


class Network(nn.Module):
    """The shadow: what all blocks share."""

    def __init__(self, config: ShadowConfig, targets: Sequence[Target]) -> None:
        super().__init__()
        base = config_of(targets[0].base)
        if base is None or getattr(base, "is_encoder_decoder", False):
            raise TargetError(f"{targets[0].path!r} is no block of a transformers decoder, which a shadow needs")
        self.place = {target.path: i for i, target in enumerate(targets)}
        self.layers_before = base.num_hidden_layers
        is_mirror = config.shadow_model == "mirror"
        backbone, projection = (mirror(base, config.sizes()), None) if is_mirror else saved(config.shadow_model)
        width, d = backbone.config.hidden_size, base.hidden_size
        self.reads_embeddings = is_mirror and config.share_embeddings and width == d
        if self.reads_embeddings and hasattr(backbone, "embed_tokens"):
            del backbone.embed_tokens
        elif self.reads_embeddings or not is_mirror:
            freeze_(backbone.get_input_embeddings())
        projection = projection or (nn.Identity() if width == d else nn.Linear(width, d, bias=False))
        self.shadow_backbone = nn.ModuleDict({"default": backbone})
        self.shadow_projection = nn.ModuleDict({"default": projection})
        if config.task_type == TaskType.SEQ_CLS:
            self.shadow_head = nn.ModuleDict({"default": nn.Linear(d, base.num_labels, bias=False)})

    def forward(self, model: Any, kwargs: dict[str, Any]) -> Tensor:
        """s_0 for the input of a call of the model."""
        backbone = self.shadow_backbone["default"]
        given = {name: kwargs[name] for name in PASSED_ON if kwargs.get(name) is not None}
        cache = caches.part_of(caches.of_call(kwargs), self, self.layers_before, backbone.config)
        if self.reads_embeddings and "inputs_embeds" not in given:
            given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
        if "inputs_embeds" in given:
            given["inputs_embeds"] = given["inputs_embeds"].to(next(backbone.parameters()).dtype)
        if cache is not None:
            given = caches.with_cache(given, caches.argument(backbone), cache)
        out = backbone(**given, use_cache=cache is not None)
        return self.shadow_projection["default"](out.last_hidden_state)

    def loss(self, s: Tensor, model: Any, kwargs: dict[str, Any]) -> Tensor:
        """The task's loss of the shadow on its own."""
        if not hasattr(self, "shadow_head"):
            return language_loss(model.get_output_embeddings(), s, kwargs["labels"])
        logits = self.shadow_head["default"](last_position(s, kwargs.get("attention_mask")))
        return classification_loss(logits, kwargs["labels"])


class Shadow(Adapter):
    kinds = frozenset({"block"})

    def __init__(self, config: ShadowConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        d, u = target.in_features, config.update_hidden_size or config.r
        self.place = self.shared.place[target.path]
        self.shadow_down = nn.ModuleDict({"default": nn.Linear(d, config.r, bias=False)})
        self.shadow_up = nn.ModuleDict({"default": nn.Linear(config.r, d, bias=False)})
        self.is_last = self.place == len(self.shared.place) - 1
        for name in ("shadow_update_transform", "shadow_update_gate"):
            layers = nn.Sequential(nn.Linear(d, u), nn.GELU(), nn.Linear(u, d))
            setattr(self, name, nn.ModuleDict({"default": freeze_(layers) if self.is_last else layers}))
        self.dropout = nn.Dropout(config.shadow_dropout)
        if config.init_weights:
            nn.init.zeros_(next(self.shadow_up.parameters()))

    def pre(self, x: Tensor) -> Tensor:
        s = self.riding()
        if s.shape[1] != x.shape[1]:
            raise VeneerError(f"the shadow saw {s.shape[1]} positions, {self.target.path!r} {x.shape[1]}")
        narrow = self.shadow_down["default"](self.dropout(x - s))
        return x + self.config.shadow_alpha * self.shadow_up["default"](narrow)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.is_last:
            s, gate = self.riding(), self.shadow_update_gate["default"](y).sigmoid()
            s = (1 - gate) * s + gate * self.shadow_update_transform["default"](y)
            facts, rows = self.target.layer.state.facts, self.target.layer.rows
            s = s if rows is None else facts[self.shared, 0].to(s).index_copy(0, rows, s)
            facts[self.shared, self.place + 1] = s
        return y.view_as(y)  # later than s: its gradient comes first, and FSDP gathers the weights for both

    def riding(self) -> Tensor:
        """The shadow's state at this block, for the rows that are being computed."""
        s = self.target.fact((self.shared, self.place))
        if s is None:
            raise VeneerError("a shadow needs a call of the whole model, whose input it reads")
        return s.to(self.dtype)

    def expected_parameters(self) -> int:
        d, r, u = self.target.in_features, self.config.r, self.config.update_hidden_size or self.config.r
        return 2 * d * r + (0 if self.is_last else 2 * (2 * d * u + d + u))

    def describe(self) -> str:
        return f"r={self.config.r}"


@dataclass(kw_only=True)
class ShadowConfig(LayerConfig):
    r: int = 8
    """Rank of the correction."""
    shadow_alpha: float = 0.1
    """Its strength."""
    shadow_dropout: float = 0.2
    """Dropout on the difference it is made of, in training."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""
    shadow_model: str = "mirror"
    """"mirror": a new network of the model's own architecture; or a directory, of a model or of a projected shadow."""
    shadow_num_hidden_layers: int | None = None
    """Layers of the mirror; None: one."""
    shadow_hidden_size: int | None = None
    """Its width; None: the model's."""
    shadow_num_attention_heads: int | None = None
    """Its attention heads; None: the model's."""
    shadow_intermediate_size: int | None = None
    """Its MLP's width; None: the model's."""
    share_embeddings: bool = True
    """The mirror reads the model's embeddings, where it is as wide."""
    update_hidden_size: int | None = None
    """Width u between the layers of T and G; None: r."""
    auxiliary_loss_weight: float = 0.05
    """How much the shadow's own loss counts."""

    peft_type, adapter, learning_rate = Name("SHADOW"), Shadow, 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "update_hidden_size", *(f"shadow_{name}" for name in self.sizes()))
        check_range(self, 1, 1000, "shadow_num_hidden_layers")
        check_range(self, 0, 1, "shadow_dropout")
        check_range(self, 0, math.inf, "auxiliary_loss_weight")
        if self.shadow_model != "mirror" and any(self.sizes().values()):
            raise ConfigError(f"sizes are the mirror's, {self.shadow_model!r} has its own; given are {self.sizes()}")

    def sizes(self) -> dict[str, int | None]:
        return {name: getattr(self, f"shadow_{name}") for name in SIZES}

    def fill_targets(self, model: nn.Module) -> None:
        self.target_modules = blocks(model)

    def build_shared(self, targets: Sequence[Target]) -> Network:
        return Network(self, targets)

    def before(self, shared: Any, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        facts[shared, 0] = shared(model, kwargs)
        is_judged = self.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_CLS) and self.auxiliary_loss_weight > 0
        if is_judged and torch.is_grad_enabled() and kwargs.get("labels") is not None:
            facts[shared, "loss"] = shared.loss(facts[shared, 0], model, kwargs)

    def loss(self, adapters: Sequence[Adapter]) -> Tensor | None:
        shadow = next(a for a in adapters if isinstance(a, Shadow))
        term = shadow.target.fact((shadow.shared, "loss"))
        return None if term is None else self.auxiliary_loss_weight * term
