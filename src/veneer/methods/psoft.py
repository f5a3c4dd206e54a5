"""PSOFT: apply a small learned rotation to the weight within its principal subspace.

    W' = W + U_r S_r (R - I) V_r^T,  R = diag(b) (I + Q) (I - Q)^-1 diag(a),  Q (r, r) skew-symmetric, W = U S V^T

Wu et al., 2025, arXiv:2505.11235. Trainable: r (r - 1) / 2 + 2 r per target. Mergeable. Starts as a no-op: Q is zero, a
and b are one. As in PEFT, the scaling psoft_alpha / r cancels out and has no effect. As in PEFT, the file holds only R:
U and V are recomputed from W, and R fits them only on hardware whose SVD chooses the same signs.
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
    """R (r, r): a rotation or any matrix, scaled by a vector on each side."""

    def __init__(self, config: PsoftConfig) -> None:
        super().__init__()
        self.config = config
        r = config.r
        start = torch.zeros(r * (r - 1) // 2) if config.psoft_orth else torch.eye(r)
        if not config.init_weights:
            start = start + 0.1 * torch.randn_like(start)
        self.weight = nn.Parameter(start)
        self.vector_b = nn.Parameter(torch.ones(r)) if config.psoft_mag_b else None
        self.vector_a = nn.Parameter(torch.ones(r)) if config.psoft_mag_a else None

    def forward(self) -> Tensor:
        R = self.rotation() if self.config.psoft_orth else self.weight
        if self.vector_b is not None:
            R = self.vector_b[:, None] * R
        if self.vector_a is not None:
            R = R * self.vector_a
        return R

    def rotation(self) -> Tensor:
        """The Cayley transform of Q, (r, r)."""
        config = self.config
        Q = skew(self.weight[None], config.r)  # (1, r, r)
        if not config.use_cayley_neumann:
            return cayley(-Q)[0]
        bound = config.cayley_neumann_eps
        if bound is not None:
            Q = Q * (bound / Q.norm().clamp_min(bound))
        return cayley_neumann(Q, config.num_cayley_neumann_terms)[0]


class PSOFT(LowRank):
    def __init__(self, config: PsoftConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.r
        W = target.original_weight()
        if self.r > min(W.shape):
            raise ConfigError(f"r = {self.r} on {target.path!r} must be at most the smaller of {tuple(W.T.shape)}")
        iterations = config.psoft_svd_lowrank_niter if config.psoft_svd == "lowrank" else None
        U, S, Vh = principal(W, self.r, iterations, config.random_seed)
        if config.ab_svd_init == "psoft_init":
            left = S
            right = torch.ones_like(S)
        else:
            left = right = S.sqrt()
        self.register_buffer("A", (right[:, None] * Vh).contiguous(), persistent=False)
        self.register_buffer("B", (U * left).contiguous(), persistent=False)
        self.psoft_R = Rotation(config)
        self.set_dropout(config.psoft_dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        R = self.psoft_R()
        identity = torch.eye(self.r, dtype=R.dtype, device=R.device)
        return self.A, self.B @ (R - identity)

    def expected_parameters(self) -> int:
        config = self.config
        r = self.r
        matrix = r * (r - 1) // 2 if config.psoft_orth else r * r
        magnitudes = r * (config.psoft_mag_a + config.psoft_mag_b)
        return matrix + magnitudes

    def describe(self) -> str:
        return f"r={self.r}"


@dataclass(kw_only=True)
class PsoftConfig(LayerConfig):
    r: int = 32
    """Size of the rotation. It has few parameters, so the default is larger than LoRA's rank."""
    psoft_alpha: int | float = 32
    """No effect: the principal part is divided by psoft_alpha / r and then multiplied by it."""
    psoft_dropout: float = 0.0
    """Dropout on the input of the update during training."""
    ab_svd_init: str = "psoft_init"
    """Singular values. "psoft_init": left of R, which keeps angles; "pissa_init": their square roots on each side."""
    psoft_svd: str = "full"
    """"full": exact SVD; "lowrank": randomised SVD, faster."""
    psoft_svd_lowrank_niter: int = 10
    """Power iterations of the randomised SVD."""
    random_seed: int = 0
    """Seed of the randomised SVD."""
    psoft_orth: bool = True
    """R is a rotation; False: any matrix."""
    psoft_mag_b: bool = True
    """Learn magnitudes on the output side of R."""
    psoft_mag_a: bool = True
    """Learn magnitudes on the input side of R."""
    use_cayley_neumann: bool = False
    """Approximate the Cayley transform by its Neumann series, without a matrix inverse."""
    num_cayley_neumann_terms: int = 5
    """Number of terms of the series."""
    cayley_neumann_eps: float | None = None
    """Upper bound, between 0 and 1, on the Frobenius norm of Q for the series; None: no bound."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""

    peft_type = Name("PSOFT")
    adapter = PSOFT
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
        check_range(self, 2, math.inf, "num_cayley_neumann_terms")
        check_range(self, 0, 1, "psoft_dropout", "cayley_neumann_eps")
        allowed = {"ab_svd_init": ("psoft_init", "pissa_init"), "psoft_svd": ("full", "lowrank")}
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
