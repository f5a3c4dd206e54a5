"""HRA: rotate the input by a chain of learned Householder reflections.

    W' = W R,  R = (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T),  each u of length one

Yuan et al., 2024, arXiv:2405.17484. Trainable: r in per target. Mergeable. Starts as a no-op if r is even: the vectors
start in equal pairs, whose reflections cancel out. `apply_GS` makes the vectors orthogonal first. The chain of
reflections is computed as one product, in the compact WY form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError
from ..targets.target import Target


class HRA(Adapter):
    kinds = frozenset({"linear", "conv"})

    def __init__(self, config: HRAConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.r
        self.apply_GS = config.apply_GS
        self.has_pre = target.kind == "linear"  # the columns of a convolution's weight are patches: only fold applies
        self.hra_u = nn.Parameter(torch.empty(target.in_features, self.r))
        if not self.hra_u.is_meta:
            self.initialise(config.init_weights)

    @torch.no_grad()
    def initialise(self, as_no_op: bool) -> None:
        if not as_no_op:
            nn.init.kaiming_uniform_(self.hra_u, a=math.sqrt(5))
            return
        if self.r % 2:
            raise ConfigError(f"HRA with odd r = {self.r} cannot start as a no-op; use an even r or init_weights=False")
        half = torch.empty(self.target.in_features, self.r // 2)
        nn.init.kaiming_uniform_(half, a=math.sqrt(5))
        self.hra_u.copy_(half.repeat_interleave(2, dim=1))

    def vectors(self) -> Tensor:
        """The unit vectors u as columns, (in, r); with `apply_GS` they are orthogonal to each other."""
        if not self.apply_GS:
            return self.hra_u / self.hra_u.norm(dim=0)
        orthogonal: list[Tensor] = []
        for u in self.hra_u.unbind(dim=1):
            for other in orthogonal:
                u = u - (other @ u) * other
            orthogonal.append(u / u.norm())
        return torch.stack(orthogonal, dim=1)

    def reflect(self, x: Tensor, U: Tensor) -> Tensor:
        """Apply the reflections along the columns of U (in, r) to the rows of x, first column first.

        Their product is I - U T U^T, where the inverse of T is upper triangular: U^T U with 1/2 on the diagonal.
        """
        wide = U.to(torch.promote_types(U.dtype, torch.float32))
        diagonal = torch.eye(self.r, device=U.device, dtype=wide.dtype) / 2
        T_inverse = torch.triu(wide.T @ wide, diagonal=1) + diagonal
        rows = torch.linalg.solve_triangular(T_inverse, wide.T, upper=True).to(U.dtype)
        return x - (x @ U) @ rows

    def pre(self, x: Tensor) -> Tensor:
        return self.reflect(x, self.vectors().flip(1))

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        U = self.vectors().to(W.dtype)
        return self.reflect(W, U), b

    def expected_parameters(self) -> int:
        return self.r * self.target.in_features

    def describe(self) -> str:
        return f"r={self.r}"


@dataclass(kw_only=True)
class HRAConfig(LayerConfig):
    r: int = 8
    """Number of reflections; must be even for a start as a no-op."""
    apply_GS: bool = False
    """Make the vectors orthogonal by the Gram-Schmidt process."""
    init_weights: bool = True
    """Start as a no-op; False: random."""

    peft_type = Name("HRA")
    adapter = HRA

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
