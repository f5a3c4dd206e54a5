"""Lily: neighbouring layers share A, all layers share experts B, and a router in each layer mixes the experts.

    y' = W x + s h sum_e p_e B_e,  h = x A^T,  p = mean over all tokens of softmax(h R^T)

Zhong et al., 2024, arXiv:2407.09946. Among targets of the same name and shape, every `stride_A` consecutive ones share
an A (r, in), and all share the experts B_e (r, out). Trainable: r in for each A, num_B r out for the experts, num_B r
for each router R. Not mergeable: p depends on the input. Starts as a no-op: B is zero.

As in PEFT and the authors' code, p is a mean over all rows of a call, including padding, so the output for a row
depends on the other rows of its batch. PEFT's files repeat A and B for each layer that shares them. Ours hold them
once; PEFT reads such a file with a warning about the missing repetitions. "all-linear" is saved as the list of the
module names that it matched. Unlike in PEFT, GPT-2's Conv1D can be a target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapter import Adding
from ..core.config import LayerConfig, Name, check_range
from ..targets.target import Matrix, Target


class Owners(nn.Module):
    """Which targets hold the shared matrices, and the matrices themselves.

    Args:
        owners: for each target, by path, the paths of the targets that hold its A and its B.
    """

    def __init__(self, owners: dict[str, tuple[str, str]]) -> None:
        super().__init__()
        self.owners = owners
        self.matrices: dict[tuple[str, str], Matrix] = {}


class Lily(Adding):
    def __init__(self, config: LilyConfig, target: Target, shared: Owners | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.r
        self.n = config.num_B
        self.scaling = config.scaling
        owner_of_A, owner_of_B = self.shared.owners[target.path]
        self.owners = {"lily_A": owner_of_A, "lily_B": owner_of_B}
        if owner_of_A == target.path:
            self.lily_A = Matrix(self.r, target.in_features)
            self.shared.matrices["lily_A", target.path] = self.lily_A
        if owner_of_B == target.path:
            self.lily_B = Matrix(self.n * self.r, target.out_features)
            self.shared.matrices["lily_B", target.path] = self.lily_B
        self.lily_router = Matrix(self.n, self.r)
        for name, weight in self.named_parameters():
            if name.startswith("lily_B") and config.init_weights:
                nn.init.zeros_(weight)
            else:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def matrix(self, name: str) -> Tensor:
        """The shared matrix that this target uses as "lily_A" or "lily_B"."""
        return self.shared.matrices[name, self.owners[name]].weight

    def term(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.matrix("lily_A"))  # (..., r)
        scores = F.linear(h, self.lily_router.weight).softmax(-1)  # (..., num_B)
        p = scores.flatten(0, -2).mean(0)
        experts = self.matrix("lily_B").unflatten(0, (self.n, self.r))  # (num_B, r, out)
        mixed = torch.einsum("e,ero->ro", p, experts)
        return h @ mixed * self.scaling

    def repeats(self) -> dict[str, str]:
        keys = {}
        for name, owner in self.owners.items():
            if owner != self.target.path:
                keys[f"{name}.weight"] = f"{owner}.{name}.weight"
        return keys

    def expected_parameters(self) -> int:
        sizes = {"lily_A": self.target.in_features, "lily_B": self.n * self.target.out_features}
        columns = self.n  # of the router
        for name, owner in self.owners.items():
            if owner == self.target.path:
                columns += sizes[name]
        return self.r * columns

    def describe(self) -> str:
        return f"r={self.r}, {self.n} experts"


@dataclass(kw_only=True)
class LilyConfig(LayerConfig):
    r: int = 32
    """Rank of the update; use two to four times LoRA's."""
    stride_A: int = 1
    """How many consecutive targets of the same name share an A."""
    num_B: int = 2
    """Number of experts B that the targets of one name share; at least 2."""
    scaling: float = 1.0
    """s: the factor of the update."""
    init_weights: bool = True
    """Start as a no-op; False: B is random too (for tests)."""

    peft_type = Name("LILY")
    adapter = Lily
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "stride_A")
        check_range(self, 2, math.inf, "num_B")

    def depends_on_call(self) -> bool:
        return True  # p is a mean over the tokens of a call

    def role(self, path: str) -> str:
        """The entry of `target_modules` that matches a path; if there are several, the longest."""
        names = self.target_modules
        if isinstance(names, str):
            return names
        matching = [name for name in names or () if path.endswith(name)]
        return max(matching, key=len)

    def build_shared(self, targets: Sequence[Target]) -> Owners:
        if self.target_modules == "all-linear":
            self.target_modules = sorted({target.path.rpartition(".")[2] for target in targets})
        groups: dict[tuple[str, int, int], list[str]] = {}
        for target in targets:
            group = (self.role(target.path), target.out_features, target.in_features)
            groups.setdefault(group, []).append(target.path)
        owners = {}
        for paths in groups.values():
            for i, path in enumerate(paths):
                start_of_stride = i - i % self.stride_A
                owners[path] = (paths[start_of_stride], paths[0])
        return Owners(owners)
