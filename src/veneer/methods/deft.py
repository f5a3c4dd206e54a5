"""DEFT: remove a learned subspace of the outputs from the weight and add new content in its place.

    W' = W - Q P'^T W + s Q R,  P (out, r), R (r, in);  "relu": Q = P, P' = relu(P);  "qr": Q = P' = qr(P)

Kumar et al., 2025, arXiv:2509.22793. Trainable: r (in + out) per target. Mergeable. Starts as a no-op: s R = P'^T W;
the file holds R. With `para` it only removes (PaRa: Chen et al., 2024, arXiv:2406.05641) and trains r out parameters.
Two active adapters act one after the other; in PEFT both remove from the same W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError
from ..targets.target import Target


class DEFT(Adapter):
    reads_weight = True  # `post` must know the bias, from which nothing is removed

    def __init__(self, config: DeftConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = min(config.r, target.out_features)
        self.scaling = 1.0 if config.alpha is None else config.alpha / self.r
        self.dropout = nn.Dropout(config.deft_dropout)
        self.deft_P = nn.Parameter(torch.empty(target.out_features, self.r))
        self.deft_R = None if config.para else nn.Parameter(torch.empty(self.r, target.in_features))
        if not self.deft_P.is_meta:
            self.initialise(config)

    @torch.no_grad()
    def initialise(self, config: DeftConfig) -> None:
        self.deft_P.normal_(std=0.02)
        if self.deft_R is None:
            return
        if config.init_weights:
            _, P = self.projection()
            W = self.target.weight().to(self.deft_P)
            self.deft_R.copy_(P.T @ W / self.scaling)
        else:
            self.deft_R.normal_(std=0.02 * config.init_scale)

    def projection(self) -> tuple[Tensor, Tensor]:
        """Q and P', both (out, r): Q P'^T y is removed from an output y."""
        if self.config.decomposition_method == "qr":
            Q, _ = torch.linalg.qr(self.deft_P.float())
            Q = Q.to(self.deft_P.dtype)
            return Q, Q
        return self.deft_P, self.deft_P.relu()

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        Q, P = self.projection()
        b = self.target.bias()
        product = y if b is None else y - b.to(y.dtype)  # W x, without the bias
        coordinates = -product @ P
        if self.deft_R is not None:
            coordinates = coordinates + F.linear(self.dropout(x), self.deft_R) * self.scaling
        return y + coordinates @ Q.T

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        Q, P = self.projection()
        Q = Q.to(W.dtype)
        P = P.to(W.dtype)
        coordinates = -P.T @ W
        if self.deft_R is not None:
            coordinates = coordinates + self.deft_R.to(W.dtype) * self.scaling
        return W + Q @ coordinates, b

    def expected_parameters(self) -> int:
        if self.config.para:
            return self.r * self.target.out_features
        return self.r * (self.target.in_features + self.target.out_features)

    def describe(self) -> str:
        variant = "para" if self.config.para else self.config.decomposition_method
        return f"r={self.r}, {variant}"


@dataclass(kw_only=True)
class DeftConfig(LayerConfig):
    r: int = 8
    """Rank of the subspace; at most the target's output size."""
    decomposition_method: str = "relu"
    """How P spans the subspace. "relu": as it is; "qr": by an orthonormal basis, which gives a true projection."""
    init_scale: float = 1.0
    """Scale of R when it starts at random (init_weights=False)."""
    alpha: int | float | None = None
    """Strength of the added content, which is scaled by alpha / r; None: no scaling."""
    para: bool = False
    """Add no new content (PaRa)."""
    deft_dropout: float = 0.0
    """Dropout on the input of the added content during training."""
    init_weights: bool = True
    """Start as a no-op; False: R starts at random."""

    peft_type = Name("DEFT")
    adapter = DEFT
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
        check_range(self, 0, 1, "deft_dropout")
        if self.alpha is not None and self.alpha <= 0:
            raise ConfigError(f"alpha must be more than 0, or None for no scaling; not {self.alpha}")
        if self.decomposition_method not in ("relu", "qr"):
            raise ConfigError(f'decomposition_method must be "relu" or "qr", not {self.decomposition_method!r}')
