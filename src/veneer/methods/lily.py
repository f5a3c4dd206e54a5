"""Lily: neighbouring layers share A, all layers share experts B, and a router of each layer mixes the experts.

    y' = W x + s h sum_e p_e B_e,  h = x A^T,  p = mean over all tokens of softmax(h R^T)

Zhong et al., 2024, arXiv:2407.09946. Among targets of one name and shape, `stride_A` in a row share A (r, in), and all
share the experts B_e (r, out). Trainable: r in for each A, num_B r out for the experts, num_B r for each router R. Not
mergeable: p depends on the input. Starts as a no-op: B is zero.

As in PEFT and the authors' code, p is a mean over all rows of a call, padding included, so what is in a batch matters.
PEFT's files hold A and B again for each layer that shares them, ours once; PEFT reads ours, with a warning about the
repetitions. "all-linear" is written as the names it found. Unlike PEFT, GPT-2's Conv1D is a target too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name, check_range
from ..targets.target import Matrix, Target


class Owners(nn.Module):
    """Which target holds the A and the B that a target uses, and the matrices found so far by owner."""

    def __init__(self, owners: dict[str, tuple[str, str]]) -> None:
        super().__init__()
        self.owners = owners
        self.matrices: dict[tuple[str, str], Matrix] = {}


class Lily(Adapter):
    def __init__(self, config: LilyConfig, target: Target, shared: Owners | None = None) -> None:
        super().__init__(config, target, shared)
        self.r, self.n, self.scaling = config.r, config.num_B, config.scaling
        self.owners = dict(zip(("lily_A", "lily_B"), self.shared.owners[target.path], strict=True))
        sizes = (self.r, target.in_features), (self.n * self.r, target.out_features)
        for (name, owner), size in zip(self.owners.items(), sizes, strict=True):
            if owner == target.path:
                self.shared.matrices[name, owner] = Matrix(*size)
                setattr(self, name, self.shared.matrices[name, owner])
        self.lily_router = Matrix(self.n, self.r)
        for name, weight in self.named_parameters():
            if name.startswith("lily_B") and config.init_weights:
                nn.init.zeros_(weight)
            else:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        A, B = (self.shared.matrices[place].weight for place in self.owners.items())
        h = nn.functional.linear(x, A)
        shares = nn.functional.linear(h, self.lily_router.weight).softmax(-1).flatten(0, -2).mean(0)
        mixed = torch.einsum("e,ero->ro", shares, B.unflatten(0, (self.n, self.r)))
        return y + h @ mixed * self.scaling

    def repeats(self) -> dict[str, str]:
        others = {name: owner for name, owner in self.owners.items() if owner != self.target.path}
        return {f"{name}.weight": f"{owner}.{name}.weight" for name, owner in others.items()}

    def expected_parameters(self) -> int:
        sizes = {"lily_A": self.target.in_features, "lily_B": self.n * self.target.out_features}
        owned = sum(sizes[name] for name, owner in self.owners.items() if owner == self.target.path)
        return self.r * (self.n + owned)

    def describe(self) -> str:
        return f"r={self.r}, {self.n} experts"


@dataclass(kw_only=True)
class LilyConfig(LayerConfig):
    r: int = 32
    """Rank of the update; two to four times LoRA's."""
    stride_A: int = 1
    """How many targets of one name in a row share A."""
    num_B: int = 2
    """Experts B for each name, at least 2."""
    scaling: float = 1.0
    """s: strength of the update."""
    init_weights: bool = True
    """Start as a no-op; False: B random too (for tests)."""

    peft_type, adapter = Name("LILY"), Lily
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "stride_A")
        check_range(self, 2, math.inf, "num_B")

    def role(self, path: str) -> str:
        """The entry of `target_modules` that means a module: the longest that fits."""
        names = self.target_modules
        return names if isinstance(names, str) else max((n for n in names or () if path.endswith(n)), key=len)

    def build_shared(self, targets: Sequence[Target]) -> Owners:
        if self.target_modules == "all-linear":
            self.target_modules = sorted({target.path.rpartition(".")[2] for target in targets})
        groups: dict[tuple[str, int, int], list[str]] = {}
        for target in targets:
            groups.setdefault((self.role(target.path), target.out_features, target.in_features), []).append(target.path)
        owners = {p: (g[i - i % self.stride_A], g[0]) for g in groups.values() for i, p in enumerate(g)}
        return Owners(owners)
