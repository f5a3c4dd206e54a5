"""Arrow: mix trained LoRA experts, token by token, by how well the input fits the direction that each reads most.

    y = W x + sum_i c_i s_i B_i A_i x,  c = softmax of the k largest |v_i . x| / temperature

v_i is the first right singular vector of B_i A_i. Ostapenko et al., 2024, arXiv:2405.11157. With `use_gks`, the mean A
and B of general adapters are first taken off each expert's (GenKnowSub: Bagherifard et al., 2025, arXiv:2505.10939).
Needs no training; if trained, the experts learn and the v_i stay. Not mergeable. PEFT puts the experts beside a router
that it cannot load again; here they are the router's own, read from the directories its config names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import check_range
from ..errors import ConfigError
from ..maths.svd import first_direction
from ..targets.target import Target
from .families.experts import Expert, build_expert, common_targets, less_mean, read_expert
from .families.variants import Aspect, Composition, Settings
from .lora import LoraConfig


@dataclass(kw_only=True)
class ArrowConfig(Settings):
    top_k: int = 3
    """k: experts a token is given to."""
    router_temperature: float = 1.0
    """Below one, the mixture is sharper."""
    use_gks: bool = False
    """Take general knowledge off the experts first."""
    task_adapter_names: list[str] | None = None
    """The experts: directories of trained LoRA adapters."""
    gks_adapter_names: list[str] | None = None
    """The general adapters, likewise."""
    rng_seed: int | None = None
    """Of PEFT's search for the v_i, which are exact here; kept for the file."""
    path_fields = ("task_adapter_names", "gks_adapter_names")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "top_k")
        check_range(self, 1e-12, math.inf, "router_temperature")

    @cached_property
    def experts(self) -> list[Expert]:
        """The experts, less general knowledge."""
        found = [read_expert(source, source, "Arrow") for source in self.task_adapter_names or ()]
        general = [tensors for _, tensors, _ in self.general]
        return [(config, less_mean(tensors, general), notes) for config, tensors, notes in found]

    @cached_property
    def general(self) -> list[Expert]:
        sources = (self.gks_adapter_names or ()) if self.use_gks else ()
        return [read_expert(source, source, "GenKnowSub") for source in sources]


class Arrow(Aspect, Adapter):
    settings = ArrowConfig

    def __init__(self, config: LoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.how: Any = config.arrow_config
        self.experts = nn.ModuleList()
        for expert, tensors, _ in self.how.experts:
            lora = build_expert(expert, tensors, target)
            if lora is not None:
                lora.set_dropout(config.lora_dropout)
                self.experts.append(lora)
        directions = [first_direction(*lora.factors()) for lora in self.experts]  # type: ignore[operator]
        self.register_buffer("prototypes", torch.stack(directions) if directions else None, persistent=False)

    @classmethod
    def check(cls, config: Any) -> None:
        how, others = config.arrow_config, [name for name in config.variants() if name != "arrow_config"]
        if others:
            raise ConfigError(f"arrow_config mixes trained adapters; it has no update of its own for {others[0]}")
        if not how.task_adapter_names or (how.use_gks and not how.gks_adapter_names):
            missing = "gks_adapter_names" if how.task_adapter_names else "task_adapter_names"
            raise ConfigError(f"ArrowConfig.{missing} must name directories of trained LoRA adapters")
        check_range(how, 1, len(how.task_adapter_names) + 1, "top_k")

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        if self.prototypes is None:
            return y
        for c, lora in zip(self.route(x).unbind(-1), self.experts, strict=True):
            y = y + c[..., None] * lora.update(x)  # type: ignore[operator]
        return y

    def route(self, x: Tensor) -> Tensor:
        """How much of each expert a token gets: (..., experts)."""
        fit = (x @ self.prototypes.T).abs()
        best = fit.topk(min(self.how.top_k, fit.shape[-1]), dim=-1)
        chosen = torch.full_like(fit, -math.inf).scatter(-1, best.indices, best.values)
        return (chosen / self.how.router_temperature).softmax(-1)

    def describe(self) -> str:
        return f"{len(self.experts)} experts"


@dataclass(kw_only=True)
class ArrowLoraConfig(LoraConfig):
    """`LoraConfig(arrow_config=ArrowConfig(...))` that finds its targets in the experts."""

    arrow_config: Settings | dict[str, Any] | None = None
    """`ArrowConfig`: the experts and how to mix them; required."""

    adapter = Composition(Arrow)  # type: ignore[assignment]

    def fill_targets(self, model: nn.Module) -> None:
        how: Any = self.arrow_config
        common_targets(model, how.general)
        self.target_modules = common_targets(model, how.experts)
