"""AdaMSS: group the outputs into clusters and learn a low-rank update for each, within the weight's main directions.

    W'_k = W_k + B_k A_k V,  [W b] = U S V truncated to r,  k a cluster of the rows of U

V (r, in + 1) is frozen; its last column updates the bias of targets that have one. A_k (r_k, r) starts at the main
directions of U_k, and B_k at zero. With `use_asa` the least important subspaces are frozen during training. Zheng
et al., 2025, NeurIPS, OpenReview:8ZdWmpYxT0. Trainable: sum_k r_k (r + rows of k) per target. Mergeable. Starts as a
no-op. The file holds V but not the clusters, which are recomputed from the base model on the CPU; a file that PEFT
wrote on a GPU may use other clusters. Unlike in PEFT, Conv1D can be a target, and the number of subspaces that keep
learning is exactly the one in the config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Adding, Tensors
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError
from ..maths.kmeans import kmeans
from ..maths.svd import randomised_svd
from ..targets.target import Target

Key = tuple[str, int]  # a subspace: the path of its target, and its index there


class AdaMSS(Adding):
    commutes = True  # type: ignore[assignment]

    def __init__(self, config: AdamssConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.moves_bias = target.original_bias() is not None
        W = self.pretrained().float().cpu()  # (out, in), or (out, in + 1) with a bias
        config.check_rank(target.path, *W.shape)
        rank = min(config.r, *W.shape)
        U, _, Vh = randomised_svd(W, rank, iterations=2, seed=config.random_seed)
        clusters = self.clusters(U)
        self.adamss_A = nn.ParameterList()
        self.adamss_B = nn.ParameterList()
        for rows in clusters:
            self.adamss_A.append(self.directions(U[rows]))
        for rows, A in zip(clusters, self.adamss_A, strict=True):
            self.adamss_B.append(self.initial_B(len(rows), len(A)))
        self.register_buffer("adamss_newB", Vh.contiguous())
        self.register_buffer("order", torch.cat(clusters).argsort(), persistent=False)

    def pretrained(self) -> Tensor:
        """The pretrained weight, with the bias as a last column if there is one."""
        W = self.target.original_weight().detach()
        b = self.target.original_bias()
        if b is None:
            return W
        return torch.cat([W, b.detach()[:, None]], dim=1)

    def clusters(self, U: Tensor) -> list[Tensor]:
        """The indices of the rows of U in each cluster."""
        count = min(self.config.num_subspaces, len(U))
        labels = torch.from_numpy(kmeans(U.numpy(), count, iterations=10))
        return [(labels == label).nonzero()[:, 0] for label in labels.unique()]

    def directions(self, rows: Tensor) -> Tensor:
        """The main directions of a cluster's rows, (r_k, r)."""
        _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        rank = self.config.subspace_rank
        if self.config.use_dynamic_rank:
            is_strong = self.config.svd_threshold * S[0] ** 2 < S**2
            rank = min(rank, int(is_strong.sum()))
        return Vh[: max(1, rank)].contiguous()

    def initial_B(self, rows: int, rank: int) -> Tensor:
        if self.config.init_weights:
            return torch.zeros(rows, rank)
        return torch.randn(rows, rank) * 0.01

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A V, (sum of r_k, in + 1), and the B_k with their rows in the target's order, (out, sum of r_k)."""
        A = torch.cat(tuple(self.adamss_A))
        B = torch.block_diag(*self.adamss_B)
        return A @ self.adamss_newB.to(A), B[self.order]

    def term(self, x: Tensor) -> Tensor:
        A, B = self.matrices()
        update = self.target.low_rank(x, A[:, : self.target.in_features], B)
        if not self.moves_bias:
            return update
        return update + B @ A[:, -1]

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = self.matrices()
        A = A.to(W.dtype)
        B = B.to(W.dtype)
        W = W + B @ A[:, : self.target.in_features]
        if b is not None:
            b = b + B @ A[:, -1]
        return W, b

    def expected_parameters(self) -> int:
        r = self.adamss_newB.shape[0]
        return sum(B.shape[1] * (r + B.shape[0]) for B in self.adamss_B)

    def describe(self) -> str:
        return f"r={self.adamss_newB.shape[0]}, {len(self.adamss_A)} subspaces"


STATISTICS = ("sensitivity", "uncertainty")


class Averages:
    """Moving averages for one parameter of a subspace since the last choice."""

    def __init__(self, parameter: Tensor) -> None:
        self.sensitivity = torch.zeros_like(parameter)  # of |weight x gradient|
        self.uncertainty = torch.zeros_like(parameter)  # of the deviation from the average so far

    def update(self, product: Tensor, beta: float, gamma: float) -> None:
        """Include |weight x gradient| of one more step."""
        deviation = (product - self.sensitivity).abs()
        self.sensitivity = self.sensitivity.lerp(product, 1 - beta)
        self.uncertainty = self.uncertainty.lerp(deviation, 1 - gamma)

    def score(self) -> float:
        return float((self.sensitivity * self.uncertainty).mean())


class Allocation:
    """Decides which subspaces keep learning: adaptive subspace allocation, run after each optimizer step."""

    def __init__(self, config: AdamssConfig, adapters: Mapping[str, AdaMSS]) -> None:
        self.config = config
        self.adapters = dict(adapters)
        self.averages: dict[Key, tuple[Averages, Averages]] = {}
        self.frozen: dict[Key, tuple[Tensor, Tensor]] = {}

    def subspaces(self) -> dict[Key, tuple[nn.Parameter, nn.Parameter]]:
        """A_k and B_k of every subspace."""
        subspaces = {}
        for path, adapter in self.adapters.items():
            for k, pair in enumerate(zip(adapter.adamss_A, adapter.adamss_B, strict=True)):
                subspaces[path, k] = pair
        return subspaces

    @torch.no_grad()
    def step(self, n: int) -> None:
        self.restore_frozen()
        config = self.config
        if not config.init_warmup <= n <= config.final_warmup:
            return
        self.observe()
        if n % config.mask_interval == 0 or n == config.final_warmup:
            self.choose(self.budget(n))
            self.averages.clear()

    def restore_frozen(self) -> None:
        """Undo the optimizer's step on frozen subspaces.

        They keep requires_grad=True, because distributed training waits for the gradient of each parameter.
        """
        subspaces = self.subspaces()
        for key, (frozen_A, frozen_B) in self.frozen.items():
            A, B = subspaces[key]
            A.copy_(frozen_A)
            B.copy_(frozen_B)

    def budget(self, n: int) -> int:
        """How many subspaces may learn after step n."""
        config = self.config
        goal = config.asa_target_subspaces
        remaining = 1 - (n - config.init_warmup) / (config.final_warmup - config.init_warmup)
        return int(goal + (len(self.subspaces()) - goal) * remaining**config.asa_schedule_exponent)

    def observe(self) -> None:
        """Update the averages of the subspaces that learn."""
        beta = self.config.asa_importance_beta
        gamma = self.config.asa_uncertainty_beta
        for key, (A, B) in self.subspaces().items():
            if key in self.frozen or A.grad is None or B.grad is None:
                continue
            if key not in self.averages:
                self.averages[key] = Averages(A), Averages(B)
            average_A, average_B = self.averages[key]
            average_A.update((A * A.grad).abs(), beta, gamma)
            average_B.update((B * B.grad).abs(), beta, gamma)

    def choose(self, budget: int) -> None:
        """Keep the `budget` most important of the subspaces that learn and freeze the others."""
        scores = {key: A.score() + B.score() for key, (A, B) in self.averages.items()}
        ascending = sorted(scores, key=scores.__getitem__)
        surplus = max(0, len(scores) - budget)
        subspaces = self.subspaces()
        for key in ascending[:surplus]:
            A, B = subspaces[key]
            self.frozen[key] = A.clone(), B.clone()

    def export(self) -> Tensors:
        """The averages and the frozen subspaces, for the training that continues from a file."""
        tensors: Tensors = {}
        for (path, k), averages in self.averages.items():
            for factor, average in zip("AB", averages, strict=True):
                for statistic in STATISTICS:
                    tensors[f"{path}.{k}.{factor}.{statistic}"] = getattr(average, statistic)
        for (path, k), values in self.frozen.items():
            for factor, value in zip("AB", values, strict=True):
                tensors[f"{path}.{k}.{factor}.frozen"] = value
        return tensors

    def absorb(self, tensors: Tensors) -> None:
        """Continue from what `export` returned."""
        for (path, k), pair in self.subspaces().items():
            values = {}
            for key in tensors:
                if key.startswith(f"{path}.{k}."):
                    values[key.removeprefix(f"{path}.{k}.")] = tensors[key].to(pair[0].device)
            if "A.frozen" in values:
                self.frozen[path, k] = values["A.frozen"], values["B.frozen"]
            if "A.sensitivity" in values:
                averages = Averages(pair[0]), Averages(pair[1])
                for factor, average in zip("AB", averages, strict=True):
                    for statistic in STATISTICS:
                        setattr(average, statistic, values[f"{factor}.{statistic}"])
                self.averages[path, k] = averages


@dataclass(kw_only=True)
class AdamssConfig(LayerConfig):
    r: int = 100
    """Number of singular directions of the weight that updates are built from; at most the smaller of its two sizes."""
    num_subspaces: int = 5
    """Number of clusters of outputs per target."""
    subspace_rank: int = 1
    """Rank of the update of one cluster."""
    init_weights: Literal["orthogonal", False] | None = "orthogonal"
    """"orthogonal": start as a no-op. None: B random (for tests)."""
    use_asa: bool = False
    """Freeze the less important subspaces during training."""
    asa_target_subspaces: int = 50
    """How many subspaces, over all targets, learn until the end."""
    init_warmup: int = 50
    """Steps before the first subspace is frozen."""
    final_warmup: int = 1000
    """The last step after which subspaces are frozen."""
    mask_interval: int = 100
    """Steps between two choices of the subspaces to freeze."""
    asa_importance_beta: float = 0.85
    """Smoothing of the importance."""
    asa_uncertainty_beta: float = 0.85
    """Smoothing of the importance's deviation."""
    asa_schedule_exponent: float = 3.0
    """Exponent of the freezing schedule: 1 freezes evenly over the steps, larger values freeze more at the start."""
    use_dynamic_rank: bool = False
    """Use fewer directions for a cluster whose singular values fall off."""
    svd_threshold: float = 0.1
    """For the dynamic rank: the smallest squared singular value that is used, relative to the largest one."""
    random_seed: int = 0
    """Seed of the decomposition."""

    peft_type = Name("ADAMSS")
    for_training = (
        "use_asa",
        "asa_target_subspaces",
        "init_warmup",
        "final_warmup",
        "mask_interval",
        "asa_importance_beta",
        "asa_uncertainty_beta",
        "asa_schedule_exponent",
    )
    adapter = AdaMSS
    learning_rate = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init_weights = self.init_weights or None  # PEFT's files have null for false
        check_range(self, 1, math.inf, "r", "num_subspaces", "subspace_rank", "asa_target_subspaces", "mask_interval")
        check_range(self, 0, 1, "asa_importance_beta", "asa_uncertainty_beta", "svd_threshold")
        if self.use_asa and (self.init_warmup >= self.final_warmup or self.asa_schedule_exponent <= 0):
            raise ConfigError("init_warmup must be less than final_warmup, and asa_schedule_exponent greater than 0")

    def check_rank(self, path: str, out: int, columns: int) -> None:
        """Raise ConfigError if r covers all of U: its rows are then equally far apart, and clusters arbitrary."""
        if min(self.r, columns) >= out:
            raise ConfigError(f"r = {self.r} on {path!r} must be below its out = {out}")

    def schedule(self, adapters: Mapping[str, Adapter]) -> Any:
        if not self.use_asa:
            return None
        return Allocation(self, adapters)  # type: ignore[arg-type]
