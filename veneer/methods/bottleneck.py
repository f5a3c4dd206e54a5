"""Bottleneck adapters: a small MLP between the layers of a transformer, with a residual around it.

    y' = y + s up(f(down(y)))     houlsby: after attention and after the MLP; pfeiffer: after the MLP
    y' = y + s up(f(down(x)))     parallel: beside the MLP, on its input (par_bn.py)

Houlsby et al., 2019, arXiv:1902.00751; Pfeiffer et al., 2021, arXiv:2005.00247; parallel: He et al., 2022,
arXiv:2110.04366. Trainable: m (in + out) + m + out per place, m = width / reduction_factor. Not mergeable: f is not
linear. Starts as a no-op, `up` is zero; the papers' starts are only near the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name, check_choice, check_range
from ..core.target import Target
from ..errors import ConfigError
from ..maths.activations import ACTIVATIONS
from ..maths.starts import STARTS
from ..structure import default_targets, layers
from ..structure import roles as roles_of

PLACEMENTS = {
    "houlsby": (("attention.out", "mlp.out"), 16, "silu", 1.0),
    "pfeiffer": (("mlp.out",), 16, "relu", 1.0),
    "parallel": (("mlp",), 2, "relu", 4.0),
}
"""What each stands behind or beside, and its paper's reduction factor, function and scaling."""


class Bottleneck(Adapter):
    kinds = frozenset({"linear", "block"})

    def __init__(self, config: BottleneckConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        _, reduction, function, scaling = PLACEMENTS[config.placement]
        self.width, out = self.reads(target), target.out_features
        self.size = self.rounded(out / (config.reduction_factor or reduction))
        self.function = ACTIVATIONS[config.non_linearity or function]
        self.adapter_down = self.project(self.width, self.size, last=False)
        self.adapter_up = self.project(self.size, out, last=True)
        self.adapter_norm_before = nn.LayerNorm(self.width) if config.ln_before else None
        self.adapter_norm_after = nn.LayerNorm(out) if config.ln_after else None
        self.dropout = nn.Dropout(config.dropout)
        learned = {"learned": (1,), "channel": (out,)}.get(config.scaling)  # type: ignore[arg-type]
        fixed = scaling if config.scaling is None else config.scaling
        self.adapter_scaling = fixed if learned is None else nn.Parameter(torch.ones(learned))

    def rounded(self, size: float) -> int:
        return max(1, int(size))

    def reads(self, target: Target) -> int:
        return target.out_features

    def project(self, width: int, size: int, last: bool) -> nn.Module:
        layer, how = nn.Linear(width, size), self.config.init_weights
        if how:
            STARTS["mam_adapter" if how is True else how](layer.weight, last)
            nn.init.zeros_(layer.bias)
        return layer

    def update(self, h: Tensor) -> Tensor:
        """What it adds to the output."""
        h = self.adapter_norm_before(h) if self.adapter_norm_before else h
        out = self.adapter_scaling * self.adapter_up(self.function(self.adapter_down(self.dropout(h))))
        return self.adapter_norm_after(out) if self.adapter_norm_after else out

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.update(y)

    def expected_parameters(self) -> int:
        config, width, out = self.config, self.width, self.target.out_features
        norms = 2 * width * config.ln_before + 2 * out * config.ln_after
        return self.size * (width + out + 1) + out + norms + {"learned": 1, "channel": out}.get(config.scaling, 0)

    def describe(self) -> str:
        return f"{self.width} -> {self.size} -> {self.target.out_features}"


@dataclass(kw_only=True)
class BottleneckConfig(LayerConfig):
    placement: str = "pfeiffer"
    """"houlsby", "pfeiffer" or "parallel"."""
    original_ln_before: bool = False
    """After the MLP: stand behind the residual sum of the layer (and its norm, where that comes last)."""
    reduction_factor: int | float | None = None
    """Width of the model over that of the bottleneck; None: 16, for parallel 2."""
    non_linearity: str | None = None
    """f: "relu", "gelu", "silu", "tanh" or others; None: the paper's."""
    scaling: float | Literal["learned", "channel"] | None = None
    """s: a number, or one learned for all or each channel; None: 1, for parallel 4."""
    ln_before: bool = False
    """A norm of its own on what it reads."""
    ln_after: bool = False
    """A norm of its own on what it adds."""
    dropout: float = 0.0
    """Dropout before the bottleneck, in training."""
    init_weights: bool | Literal["bert", "mam_adapter", "houlsby"] = True
    """True or "mam_adapter": a no-op; "bert", "houlsby": small random weights; False: larger ones (for tests)."""

    input_modules: list[str] | None = None
    """Of target_modules those that an MLP begins with, for "parallel" where it is no module; None: see the model."""

    peft_type, adapter = Name("BOTTLENECK"), Bottleneck
    subsets = ("input_modules",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, PLACEMENTS, "placement")
        check_choice(self, ACTIVATIONS, "non_linearity")
        if self.reduction_factor is not None and self.reduction_factor <= 0:
            raise ConfigError(f"reduction_factor must be greater than 0, not {self.reduction_factor}")
        if self.original_ln_before and self.placement != "pfeiffer":
            raise ConfigError(f'original_ln_before goes with placement="pfeiffer", not {self.placement!r}')
        if self.input_modules and self.placement != "parallel":
            raise ConfigError(f'input_modules go with placement="parallel", not {self.placement!r}')
        check_range(self, 0, 1, "dropout")

    def build(self, target: Target, shared: nn.Module | None = None, **kwargs: Any) -> Adapter:
        if self.placement != "parallel":
            return super().build(target, shared, **kwargs)
        from .par_bn import part_at

        return part_at(self, target, shared)

    def fill_targets(self, model: nn.Module) -> None:
        roles = PLACEMENTS[self.placement][0]
        if roles == ("mlp",) and "mlp" not in roles_of(model).values():
            self.input_modules, roles = default_targets(model, ("mlp.in",)), ("mlp.in", "mlp.out")
        self.target_modules = layers(model) if self.original_ln_before else default_targets(model, roles)

    def build_shared(self, targets: Sequence[Target]) -> nn.Module | None:
        from .par_bn import Inputs

        return Inputs() if self.input_modules else None
