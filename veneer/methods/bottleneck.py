"""Bottleneck adapters: a small MLP between the layers of a transformer, with a residual around it.

    y' = y + up(f(down(y)))       houlsby: after attention and after the MLP; pfeiffer: after the MLP
    y' = y + s up(f(down(x)))     parallel: beside the MLP, on its input

Houlsby et al., 2019, arXiv:1902.00751; Pfeiffer et al., 2021, arXiv:2005.00247; parallel: He et al., 2022,
arXiv:2110.04366. Trainable: m (in + out) + m + out per place, m = width / reduction_factor. Not mergeable: f is not
linear. Starts as a no-op: `up` is zero (Houlsby's start is only near the identity). PEFT has no such method; the file
follows its rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name, check_range
from ..core.target import Target
from ..errors import ConfigError, nearest
from ..structure import default_targets


class Placement(NamedTuple):
    """Where the adapters stand, and the settings of the paper that put them there."""

    roles: tuple[str, ...]
    reduction_factor: float
    non_linearity: str
    scaling: float


PLACEMENTS = {
    "houlsby": Placement(("attention.out", "mlp.out"), 16, "silu", 1.0),
    "pfeiffer": Placement(("mlp.out",), 16, "relu", 1.0),
    "parallel": Placement(("mlp",), 2, "relu", 4.0),
}
FUNCTIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "swish": F.silu, "tanh": F.tanh}


class Bottleneck(Adapter):
    kinds = frozenset({"linear", "block"})

    def __init__(self, config: BottleneckConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        paper = PLACEMENTS[config.placement]
        self.is_parallel = config.placement == "parallel"
        self.scaling = paper.scaling if config.scaling is None else config.scaling
        self.function = FUNCTIONS[config.non_linearity or paper.non_linearity]
        width = target.in_features if self.is_parallel else target.out_features
        size = max(1, int(target.out_features / (config.reduction_factor or paper.reduction_factor)))
        self.adapter_down = nn.Linear(width, size)
        self.adapter_up = nn.Linear(size, target.out_features)
        self.dropout = nn.Dropout(config.dropout)
        if config.init_weights:
            nn.init.zeros_(self.adapter_up.weight)
            nn.init.zeros_(self.adapter_up.bias)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.function(self.adapter_down(self.dropout(x if self.is_parallel else y)))
        return y + self.scaling * self.adapter_up(hidden)

    def expected_parameters(self) -> int:
        width, size, out = self.adapter_down.in_features, self.adapter_up.in_features, self.adapter_up.out_features
        return size * (width + out) + size + out

    def describe(self) -> str:
        return f"{self.adapter_down.in_features} -> {self.adapter_down.out_features} -> {self.adapter_up.out_features}"


@dataclass(kw_only=True)
class BottleneckConfig(LayerConfig):
    placement: str = "pfeiffer"
    """"houlsby", "pfeiffer" or "parallel"."""
    reduction_factor: int | float | None = None
    """Width of the model over that of the bottleneck; None: 16, for parallel 2."""
    non_linearity: str | None = None
    """"relu", "gelu", "silu" or "tanh"; None: the paper's."""
    scaling: float | None = None
    """s; None: 1, for parallel 4."""
    dropout: float = 0.0
    """Dropout before the bottleneck, in training."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""

    peft_type, adapter = Name("BOTTLENECK"), Bottleneck

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.placement not in PLACEMENTS:
            raise ConfigError(
                f"placement {self.placement!r} is unknown; use one of {', '.join(PLACEMENTS)}"
                f"{nearest(self.placement, PLACEMENTS)}"
            )
        if self.non_linearity is not None and self.non_linearity not in FUNCTIONS:
            raise ConfigError(f"non_linearity must be one of {', '.join(FUNCTIONS)}, not {self.non_linearity!r}")
        if self.reduction_factor is not None and self.reduction_factor <= 0:
            raise ConfigError(f"reduction_factor must be greater than 0, not {self.reduction_factor}")
        check_range(self, 0, 1, "dropout")

    def fill_targets(self, model: nn.Module) -> None:
        self.target_modules = default_targets(model, PLACEMENTS[self.placement].roles)
