"""Bottleneck adapters: a small MLP between the layers of a transformer, with a residual connection around it.

    y' = y + s up(f(down(y)))     houlsby: after attention and after the MLP; pfeiffer: after the MLP
    y' = y + s up(f(down(x)))     parallel: in parallel to the MLP, on its input (par_bn.py)

Houlsby et al., 2019, arXiv:1902.00751; Pfeiffer et al., 2021, arXiv:2005.00247; parallel: He et al., 2022,
arXiv:2110.04366. Trainable: m (in + out) + m + out per place, m = width / reduction_factor. Not mergeable: f is not
linear. Starts as a no-op: `up` is zero. The papers' own starts are only near the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name, check_choice, check_range
from ..errors import ConfigError
from ..maths.activations import ACTIVATIONS
from ..targets.roles import default_targets, layers
from ..targets.roles import roles as roles_of
from ..targets.target import Target
from .families.bottleneck import PLACEMENTS, Bottleneck


@dataclass(kw_only=True)
class BottleneckConfig(LayerConfig):
    placement: str = "pfeiffer"
    """"houlsby", "pfeiffer" or "parallel"."""
    original_ln_before: bool = False
    """For "pfeiffer": act after the layer's residual sum, and after its norm if the norm comes last."""
    reduction_factor: int | float | None = None
    """Width of the model divided by the width of the bottleneck; None: 16, or 2 for "parallel"."""
    non_linearity: str | None = None
    """The activation function f: "relu", "gelu", "silu", "tanh" and others; None: that of the paper."""
    scaling: float | Literal["learned", "channel"] | None = None
    """s: a number, "learned" for one learned factor, "channel" for one per channel; None: 1, or 4 for "parallel"."""
    ln_before: bool = False
    """Add a trained LayerNorm on the adapter's input."""
    ln_after: bool = False
    """Add a trained LayerNorm on the adapter's output, before it is added."""
    dropout: float = 0.0
    """Dropout before the bottleneck during training."""
    init_weights: bool | Literal["bert", "mam_adapter", "houlsby"] = True
    """True or "mam_adapter": a no-op; "bert", "houlsby": small random weights; False: larger ones (for tests)."""

    input_modules: list[str] | None = None
    """For "parallel", if the MLP is not a module: the target_modules that are its first layer; None: by the model."""

    peft_type = Name("BOTTLENECK")
    adapter = Bottleneck
    subsets = ("input_modules",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, PLACEMENTS, "placement")
        check_choice(self, ACTIVATIONS, "non_linearity")
        if self.reduction_factor is not None and self.reduction_factor <= 0:
            raise ConfigError(f"reduction_factor must be greater than 0, not {self.reduction_factor}")
        if self.original_ln_before and self.placement != "pfeiffer":
            raise ConfigError(f'original_ln_before requires placement="pfeiffer", not {self.placement!r}')
        if self.input_modules and self.placement != "parallel":
            raise ConfigError(f'input_modules go with placement="parallel", not {self.placement!r}')
        check_range(self, 0, 1, "dropout")

    def build(self, target: Target, shared: nn.Module | None = None, **kwargs: Any) -> Adapter:
        if self.placement != "parallel":
            return super().build(target, shared, **kwargs)
        from .families.parallel import part_at

        return part_at(self, target, shared)

    def fill_targets(self, model: nn.Module) -> None:
        roles = PLACEMENTS[self.placement][0]
        if roles == ("mlp",) and "mlp" not in roles_of(model).values():
            self.input_modules = default_targets(model, ("mlp.in",))
            roles = ("mlp.in", "mlp.out")
        if self.original_ln_before:
            self.target_modules = layers(model)
        else:
            self.target_modules = default_targets(model, roles)

    def build_shared(self, targets: Sequence[Target]) -> nn.Module | None:
        from .families.parallel import Inputs

        return Inputs() if self.input_modules else None
