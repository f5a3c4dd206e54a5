"""PSOFT: turn the weight within its principal subspace by a small learned rotation.

    W' = W + U_r S_r (R - I) V_r^T,  R = diag(b) (I + Q) (I - Q)^-1 diag(a),  Q (r, r) skew-symmetric, W = U S V^T

Wu et al., 2025, arXiv:2505.11235. Trainable: r (r - 1) / 2 + 2 r per target. Mergeable. Starts as a no-op: Q is zero,
a and b are one. The scaling psoft_alpha / r divides what it multiplies, so it has no effect. The file holds R alone,
as PEFT's does: U and V come back from W, and their signs only on hardware whose SVD chooses the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import LowRank
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError
from ..maths.cayley import cayley, cayley_neumann, skew
from ..maths.svd import principal
from ..targets.target import Target


class Rotation(nn.Module):
    """R (r, r): a rotation between two vectors of magnitudes, or any matrix."""

    def __init__(self, config: PsoftConfig) -> None:
        super().__init__()
        self.config, r = config, config.r
        start = torch.zeros(r * (r - 1) // 2) if config.psoft_orth else torch.eye(r)
        if not config.init_weights:
            start = start + 0.1 * torch.randn_like(start)
        self.weight = nn.Parameter(start)
        self.vector_b = nn.Parameter(torch.ones(r)) if config.psoft_mag_b else None
        self.vector_a = nn.Parameter(torch.ones(r)) if config.psoft_mag_a else None

    def forward(self) -> Tensor:
        R = self.turn() if self.config.psoft_orth else self.weight
        R = R if self.vector_b is None else self.vector_b[:, None] * R
        return R if self.vector_a is None else R * self.vector_a

    def turn(self) -> Tensor:
        config, Q = self.config, skew(self.weight[None], self.config.r)
        if not config.use_cayley_neumann:
            return cayley(-Q)[0]
        if config.cayley_neumann_eps is not None:
            Q = Q * (config.cayley_neumann_eps / Q.norm().clamp_min(config.cayley_neumann_eps))
        return cayley_neumann(Q, config.num_cayley_neumann_terms)[0]


class PSOFT(LowRank):
    def __init__(self, config: PsoftConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        W, self.r = target.original_weight(), config.r
        if self.r > min(W.shape):
            raise ConfigError(f"r = {self.r} on {target.path!r} must be at most the smaller of {tuple(W.T.shape)}")
        iterations = config.psoft_svd_lowrank_niter if config.psoft_svd == "lowrank" else None
        U, S, Vh = principal(W, self.r, iterations, config.random_seed)
        left, right = (S, torch.ones_like(S)) if config.ab_svd_init == "psoft_init" else (S.sqrt(), S.sqrt())
        self.register_buffer("A", (right[:, None] * Vh).contiguous(), persistent=False)
        self.register_buffer("B", (U * left).contiguous(), persistent=False)
        self.psoft_R = Rotation(config)
        self.set_dropout(config.psoft_dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        R = self.psoft_R()
        return self.A, self.B @ (R - torch.eye(self.r, dtype=R.dtype, device=R.device))

    def expected_parameters(self) -> int:
        config, r = self.config, self.r
        return (r * (r - 1) // 2 if config.psoft_orth else r * r) + r * (config.psoft_mag_a + config.psoft_mag_b)

    def describe(self) -> str:
        return f"r={self.r}"


@dataclass(kw_only=True)
class PsoftConfig(LayerConfig):
    r: int = 32
    """Size of the rotation; cheap, so larger than LoRA's rank."""
    psoft_alpha: int | float = 32
    """No effect: the principal part is divided by psoft_alpha / r before it is multiplied by it."""
    psoft_dropout: float = 0.0
    """Dropout on the input of the update, in training."""
    ab_svd_init: str = "psoft_init"
    """Singular values: "psoft_init" left of R, which keeps the angles; "pissa_init": their roots on both sides."""
    psoft_svd: str = "full"
    """"full": exact singular vectors; "lowrank": randomised, faster."""
    psoft_svd_lowrank_niter: int = 10
    """Power iterations of the randomised ones."""
    random_seed: int = 0
    """Seed of the randomised ones."""
    psoft_orth: bool = True
    """R is a rotation; False: any matrix."""
    psoft_mag_b: bool = True
    """Learn magnitudes on the output side of R."""
    psoft_mag_a: bool = True
    """Learn magnitudes on the input side of R."""
    use_cayley_neumann: bool = False
    """The Cayley transform by its series, without a matrix inverse."""
    num_cayley_neumann_terms: int = 5
    """Length of the series."""
    cayley_neumann_eps: float | None = None
    """Bound on the Frobenius norm of Q for the series, within (0, 1); None: no bound."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""

    peft_type, adapter = Name("PSOFT"), PSOFT
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
        check_range(self, 2, math.inf, "num_cayley_neumann_terms")
        check_range(self, 0, 1, "psoft_dropout", "cayley_neumann_eps")
        for name, choices in {"ab_svd_init": ("psoft_init", "pissa_init"), "psoft_svd": ("full", "lowrank")}.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
