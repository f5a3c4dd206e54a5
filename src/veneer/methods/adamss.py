"""AdaMSS: learn a low-rank update for each of a few groups of outputs, from the weight's own directions.

    W'_k = W_k + B_k A_k V,  [W b] = U S V truncated to r,  k a cluster of the rows of U

V (r, in + 1) is frozen; its last column, where there is a bias, moves that. A_k (r_k, r) starts at the main directions
of U_k, B_k at zero. With `use_asa` the subspaces of least importance are frozen one after another. Zheng et al., 2025,
NeurIPS, on low-rank representation: Liu et al., 2010, arXiv:1010.2955. Trainable: sum_k r_k (r + rows of k) per target.
Mergeable. Starts as a no-op. The file holds V, not the clusters, which are found again in the base model, on the CPU:
files of PEFT's from a GPU have others. Unlike there, Conv1D is a target, and as many subspaces learn on as asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError
from ..maths.kmeans import kmeans
from ..maths.svd import randomised_svd
from ..targets.target import Target

Key = tuple[str, int]  # a subspace: the path of its target, and its number there


class AdaMSS(Adapter):
    commutes = True  # type: ignore[assignment]

    def __init__(self, config: AdamssConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        W, b = target.original_weight().detach(), target.original_bias()
        self.moves_bias = b is not None
        W = (W if b is None else torch.cat([W, b.detach()[:, None]], dim=1)).float().cpu()
        config.check_rank(target.path, *W.shape)
        U, _, Vh = randomised_svd(W, min(config.r, *W.shape), iterations=2, seed=config.random_seed)
        labels = torch.from_numpy(kmeans(U.numpy(), min(config.num_subspaces, len(U)), iterations=10))
        clusters = [(labels == k).nonzero()[:, 0] for k in labels.unique()]
        self.adamss_A = nn.ParameterList(self.directions(U[rows]) for rows in clusters)
        self.adamss_B = nn.ParameterList(
            torch.zeros(len(rows), len(A)) if config.init_weights else torch.randn(len(rows), len(A)) * 0.01
            for rows, A in zip(clusters, self.adamss_A, strict=True)
        )
        self.register_buffer("adamss_newB", Vh.contiguous())
        self.register_buffer("order", torch.cat(clusters).argsort(), persistent=False)

    def directions(self, rows: Tensor) -> Tensor:
        """The main directions of a cluster's rows, (r_k, r)."""
        _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        is_strong = (self.config.svd_threshold * S[0] ** 2 < S**2) | (not self.config.use_dynamic_rank)
        return Vh[: max(1, min(self.config.subspace_rank, int(is_strong.sum())))].contiguous()

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A V, (sum of r_k, in + 1), and the B_k with their rows in the target's order, (out, sum of r_k)."""
        A, B = torch.cat(tuple(self.adamss_A)), torch.block_diag(*self.adamss_B)
        return A @ self.adamss_newB.to(A), B[self.order]

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        A, B = self.matrices()
        y = y + self.target.low_rank(x, A[:, : self.target.in_features], B)
        return y + B @ A[:, -1] if self.moves_bias else y

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = (t.to(W.dtype) for t in self.matrices())
        return W + B @ A[:, : self.target.in_features], b if b is None else b + B @ A[:, -1]

    def expected_parameters(self) -> int:
        r = self.adamss_newB.shape[0]
        return sum(B.shape[1] * (r + B.shape[0]) for B in self.adamss_B)

    def describe(self) -> str:
        return f"r={self.adamss_newB.shape[0]}, {len(self.adamss_A)} subspaces"


class Allocation:
    """Which subspaces still learn: adaptive subspace allocation, run after each optimizer step."""

    def __init__(self, config: AdamssConfig, adapters: Mapping[str, AdaMSS]) -> None:
        self.config, self.adapters = config, dict(adapters)
        self.averages: dict[Key, list[tuple[Tensor, Tensor]]] = {}
        self.frozen: dict[Key, tuple[Tensor, ...]] = {}

    def subspaces(self) -> dict[Key, tuple[nn.Parameter, nn.Parameter]]:
        pairs = {path: zip(a.adamss_A, a.adamss_B, strict=True) for path, a in self.adapters.items()}
        return {(path, i): pair for path in pairs for i, pair in enumerate(pairs[path])}

    @torch.no_grad()
    def step(self, n: int) -> None:
        config, pairs = self.config, self.subspaces()
        for key, values in self.frozen.items():
            for parameter, value in zip(pairs[key], values, strict=True):
                parameter.copy_(value)  # not requires_grad=False: distributed training waits for each gradient
        if config.init_warmup <= n <= config.final_warmup:
            self.observe()
            if n % config.mask_interval == 0 or n == config.final_warmup:
                self.choose(self.budget(n))
                self.averages.clear()

    def budget(self, n: int) -> int:
        """How many subspaces may learn after step n."""
        config, goal = self.config, self.config.asa_target_subspaces
        left = 1 - (n - config.init_warmup) / (config.final_warmup - config.init_warmup)
        return int(goal + (len(self.subspaces()) - goal) * left**config.asa_schedule_exponent)

    def observe(self) -> None:
        """Move the averages of |weight x gradient| and of its spread, for the subspaces that learn."""
        beta, gamma = self.config.asa_importance_beta, self.config.asa_uncertainty_beta
        for key, pair in self.subspaces().items():
            if key not in self.frozen and all(p.grad is not None for p in pair):
                now = [(p * p.grad).abs() for p in pair]  # type: ignore[operator]
                old = self.averages.get(key) or [(torch.zeros_like(t),) * 2 for t in now]
                self.averages[key] = [
                    (mean.lerp(t, 1 - beta), spread.lerp((t - mean).abs(), 1 - gamma))
                    for (mean, spread), t in zip(old, now, strict=True)
                ]

    def choose(self, budget: int) -> None:
        """Freeze all but the `budget` most important of the subspaces that learn."""
        scores = {key: sum(float((m * s).mean()) for m, s in both) for key, both in self.averages.items()}
        least = sorted(scores, key=scores.__getitem__)[: max(0, len(scores) - budget)]
        self.frozen |= {key: tuple(p.clone() for p in self.subspaces()[key]) for key in least}


@dataclass(kw_only=True)
class AdamssConfig(LayerConfig):
    r: int = 100
    """Singular directions of the weight that updates are made of, at most its smaller size."""
    num_subspaces: int = 5
    """Clusters of outputs per target."""
    subspace_rank: int = 1
    """Rank of a cluster's update."""
    init_weights: Literal["orthogonal", False] | None = "orthogonal"
    """"orthogonal": start as a no-op. None: B random (for tests)."""
    use_asa: bool = False
    """Freeze the less important subspaces during training."""
    asa_target_subspaces: int = 50
    """How many subspaces, of all targets, learn to the end."""
    init_warmup: int = 50
    """Steps before the first subspace is frozen."""
    final_warmup: int = 1000
    """The step after which no more are frozen."""
    mask_interval: int = 100
    """Steps between two choices."""
    asa_importance_beta: float = 0.85
    """Smoothing of the importance."""
    asa_uncertainty_beta: float = 0.85
    """Smoothing of its spread."""
    asa_schedule_exponent: float = 3.0
    """How fast the first ones are frozen; 1: evenly over the steps."""
    use_dynamic_rank: bool = False
    """Fewer directions where a cluster's singular values fall off."""
    svd_threshold: float = 0.1
    """What a (squared) singular value must reach, relative to the largest, to count for the dynamic rank."""
    random_seed: int = 0
    """Seed of the decomposition."""

    peft_type, adapter = Name("ADAMSS"), AdaMSS
    learning_rate = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init_weights = self.init_weights or None  # PEFT's files have null for false
        check_range(self, 1, math.inf, "r", "num_subspaces", "subspace_rank", "asa_target_subspaces", "mask_interval")
        check_range(self, 0, 1, "asa_importance_beta", "asa_uncertainty_beta", "svd_threshold")
        if self.use_asa and (self.init_warmup >= self.final_warmup or self.asa_schedule_exponent <= 0):
            raise ConfigError("init_warmup must lie before final_warmup, and asa_schedule_exponent be above 0")

    def check_rank(self, path: str, out: int, columns: int) -> None:
        """Raise where all of U is taken: its rows are equally far apart, and clusters would follow from rounding."""
        if min(self.r, columns) >= out:
            raise ConfigError(f"r = {self.r} on {path!r} must be below its out = {out}")

    def schedule(self, adapters: Mapping[str, Adapter]) -> Any:
        return Allocation(self, adapters) if self.use_asa else None  # type: ignore[arg-type]
