"""Arrow: mix trained LoRA experts for each token, by how well the input matches each expert's main input direction.

    y = W x + sum_i c_i s_i B_i A_i x,  c = softmax of the k largest |v_i . x| / temperature

v_i is the first right singular vector of B_i A_i. Ostapenko et al., 2024, arXiv:2405.11157. With `use_gks`, the mean A
and B of general adapters are first subtracted from those of each expert (GenKnowSub: Bagherifard et al., 2025,
arXiv:2505.10939). Needs no training; if it is trained, the experts learn and the v_i stay fixed. Not mergeable. PEFT
keeps the experts as separate adapters and cannot load the router again; here the experts are parts of the router, and
are read from the directories that its config names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

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
    """k: number of experts for each token."""
    router_temperature: float = 1.0
    """Temperature of the softmax; values below 1 make the mixture sharper."""
    use_gks: bool = False
    """Subtract general knowledge from the experts first."""
    task_adapter_names: list[str] | None = None
    """Directories of trained LoRA adapters, the experts."""
    gks_adapter_names: list[str] | None = None
    """Directories of the general adapters, for `use_gks`."""
    rng_seed: int | None = None
    """Ignored, since the v_i are exact here; kept for PEFT compatibility."""
    path_fields = ("task_adapter_names", "gks_adapter_names")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "top_k")
        check_range(self, 1e-12, math.inf, "router_temperature")

    @cached_property
    def experts(self) -> list[Expert]:
        """The experts, with general knowledge subtracted."""
        experts = _read(self.task_adapter_names, "Arrow")
        general = [tensors for _, tensors, _ in self.general]
        specialised = []
        for config, tensors, provenance in experts:
            specialised.append((config, less_mean(tensors, general), provenance))
        return specialised

    @cached_property
    def general(self) -> list[Expert]:
        if not self.use_gks:
            return []
        return _read(self.gks_adapter_names, "GenKnowSub")


def _read(sources: list[str] | None, mixer: str) -> list[Expert]:
    return [read_expert(source, source, mixer) for source in sources or ()]


class Arrow(Aspect, Adapter):
    settings = ArrowConfig

    def __init__(self, config: LoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.experts = nn.ModuleList()
        directions = []
        arrow: Any = config.arrow_config
        for expert, tensors, _ in arrow.experts:
            lora = build_expert(expert, tensors, target)
            if lora is None:
                continue
            lora.set_dropout(config.lora_dropout)
            self.experts.append(lora)
            directions.append(first_direction(*lora.factors()))
        prototypes = torch.stack(directions) if directions else None  # (experts, in)
        self.register_buffer("prototypes", prototypes, persistent=False)

    @classmethod
    def check(cls, config: Any) -> None:
        arrow = config.arrow_config
        others = [name for name in config.variants() if name != "arrow_config"]
        if others:
            raise ConfigError(f"arrow_config mixes trained adapters; it has no update of its own for {others[0]}")
        if not arrow.task_adapter_names:
            _refuse_missing("task_adapter_names")
        if arrow.use_gks and not arrow.gks_adapter_names:
            _refuse_missing("gks_adapter_names")
        check_range(arrow, 1, len(arrow.task_adapter_names) + 1, "top_k")

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        if self.prototypes is None:
            return y
        shares = self.route(x).unbind(-1)
        for share, lora in zip(shares, self.experts, strict=True):
            y = y + share[..., None] * lora.term(x)  # type: ignore[operator]
        return y

    def route(self, x: Tensor) -> Tensor:
        """The share of each expert for each token: (..., experts)."""
        fit = (x @ self.prototypes.T).abs()
        arrow = self.config.arrow_config
        best = fit.topk(min(arrow.top_k, fit.shape[-1]), dim=-1)
        chosen = torch.full_like(fit, -math.inf).scatter(-1, best.indices, best.values)
        return (chosen / arrow.router_temperature).softmax(-1)

    def describe(self) -> str:
        return f"{len(self.experts)} experts"


def _refuse_missing(name: str) -> NoReturn:
    raise ConfigError(f"ArrowConfig.{name} must name directories of trained LoRA adapters")


@dataclass(kw_only=True)
class ArrowLoraConfig(LoraConfig):
    """`LoraConfig(arrow_config=ArrowConfig(...))` whose targets are those of the experts."""

    arrow_config: Settings | dict[str, Any] | None = None
    """`ArrowConfig`: the experts and how to mix them; required."""

    adapter = Composition(Arrow)  # type: ignore[assignment]

    def fill_targets(self, model: nn.Module) -> None:
        arrow: Any = self.arrow_config
        common_targets(model, arrow.general)  # raises unless they fit the model
        self.target_modules = common_targets(model, arrow.experts)
