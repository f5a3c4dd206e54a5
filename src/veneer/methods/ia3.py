"""(IA)^3: scale the keys, the values and the hidden units of the MLP by learned vectors.

    y' = l * y  (attention),   y' = W (l * x)  (feed-forward)

Liu et al., 2022, arXiv:2205.05638. Trainable: out per attention target, in per feed-forward target. Mergeable.
Starts as a no-op: l is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name
from ..errors import ConfigError
from ..files.regex import fits
from ..targets.roles import default_targets
from ..targets.target import Target
from ..targets.walk import matches


class IA3(Adapter):
    kinds = frozenset({"linear", "conv"})

    def __init__(self, config: IA3Config, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.is_feedforward = config.is_feedforward(target.path)
        self.has_pre = self.is_feedforward
        self.has_post = not self.is_feedforward
        size = target.in_channels if self.is_feedforward else target.out_features
        shape: tuple[int, ...]
        if target.kind == "conv":
            spatial = (1,) * target.spatial
            shape = (1, size, *spatial)
        elif self.is_feedforward:
            shape = (1, size)
        else:
            shape = (size, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape) if config.init_ia3_weights else torch.randn(shape))

    def vector(self, like: Tensor) -> Tensor:
        """l, shaped to broadcast over the channels of an activation."""
        return self.target.channels(self.ia3_l.flatten(), like)

    def pre(self, x: Tensor) -> Tensor:
        return x * self.vector(x)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.vector(y)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.ia3_l.flatten().to(W.dtype)
        if self.is_feedforward:
            return W * self.target.columns(scale), b
        if b is not None:
            b = b * scale
        return W * scale[:, None], b

    def describe(self) -> str:
        side = "in" if self.is_feedforward else "out"
        return f"{side}={self.ia3_l.numel()}"


@dataclass(kw_only=True)
class IA3Config(LayerConfig):
    feedforward_modules: str | list[str] | None = None
    """The target modules whose input is scaled instead of their output; None: the MLP's output projections."""
    init_ia3_weights: bool = True
    """Start as a no-op, l = 1; False: random (for tests)."""

    peft_type = Name("IA3")
    adapter = IA3
    subsets = ("feedforward_modules",)
    default_roles = ("attention.k", "attention.v", "attention.qkv", "mlp.out")

    def __post_init__(self) -> None:
        if isinstance(self.feedforward_modules, (set, tuple)):
            self.feedforward_modules = sorted(self.feedforward_modules)
        super().__post_init__()
        if isinstance(self.feedforward_modules, list) and isinstance(self.target_modules, list):
            stray = [name for name in self.feedforward_modules if name not in self.target_modules]
            if stray:
                raise ConfigError(f"feedforward_modules must be among target_modules; {', '.join(stray)} is not")

    def fill_targets(self, model: nn.Module) -> None:
        super().fill_targets(model)
        if self.feedforward_modules is None:
            self.feedforward_modules = default_targets(model, ["mlp.out"])

    def is_feedforward(self, path: str) -> bool:
        if isinstance(self.feedforward_modules, str):
            return fits(self.feedforward_modules, path, "feedforward_modules")
        return any(matches(path, name) for name in self.feedforward_modules or ())
