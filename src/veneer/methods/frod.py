"""FRoD: decompose the weights of all layers in one basis, and learn their scales and a sparse rotation of them.

    W = U diag(s) V^T,  W' = U (diag(l) + S) V^T,  l learned from s, S sparse at random places, zero at the start

V (in, in) is shared by modules of one category (PEFT's: the last two parts of the path). Wan et al., 2025,
arXiv:2512.23485. Trainable: in + sparse_rate in^2 per target. Mergeable. Starts as a no-op.
Unlike PEFT, U always follows from the file's own V, and only what differs from W is added: the start is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Additive, Tensors
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError, TargetError
from ..maths.joint import joint_basis, left_vectors, off_diagonal
from ..targets.target import Target
from .families.categories import by_category, category


class Basis(nn.Module):
    """For each category V and the places of S, and the adapters that stand on them."""

    def __init__(self, config: FrodConfig, targets: dict[str, Target]) -> None:
        super().__init__()
        self.frod_V, self.frod_s_indices, self.frod_s_size = nn.Module(), nn.Module(), nn.Module()
        self.members: list[FRoD] = []
        from_file = config.save_projection and torch.empty(0).is_meta
        generator = torch.Generator(device="cpu").manual_seed(config.projection_prng_key)
        for name, paths in by_category(targets).items():
            n = targets[paths[0]].in_features
            if any(t.in_features != n for path, t in targets.items() if category(path) == name):
                raise TargetError(f"{paths[0]!r} and its like share a basis, but their inputs differ in size")
            weights = (targets[path].original_weight().detach().float().cpu() for path in paths)
            V = torch.empty(n, n) if from_file else joint_basis(weights, config.regularization_alpha)
            places, size = off_diagonal(n, config.entries(n), generator), torch.tensor([n, n], device="cpu")
            for part, tensor in ((self.frod_V, V), (self.frod_s_indices, places), (self.frod_s_size, size)):
                part.register_buffer(name, tensor.contiguous(), persistent=config.save_projection)

    def absorb(self, tensors: Tensors) -> None:
        self.load_state_dict(tensors, strict=False, assign=any(t.is_meta for t in self.state_dict().values()))
        for member in self.members if tensors else ():
            member.decompose()


class FRoD(Additive):
    def __init__(self, config: FrodConfig, target: Target, shared: Basis | None = None) -> None:
        super().__init__(config, target, shared)
        self.category, n = category(target.path), target.in_features
        self.dropout = nn.Dropout(config.frod_dropout)
        self.register_buffer("U", None, persistent=False)
        self.register_buffer("s", torch.empty(n), persistent=False)
        self.shared.members.append(self)
        if not self.V.is_meta:
            self.decompose()
        self.frod_lambda_l = nn.Parameter(self.s.clone())
        self.frod_lambda_s_values = nn.Parameter(torch.zeros(config.entries(n)))
        for p in self.parameters() if not config.init_weights else ():
            p.data.add_(torch.randn_like(p), alpha=0.1)

    @property
    def V(self) -> Tensor:
        return self.shared.frod_V.get_buffer(self.category)

    def decompose(self) -> None:
        self.U, self.s = left_vectors(self.target.original_weight().detach(), self.V)

    def change(self) -> Tensor:
        """diag(l - s) + S, (in, in)."""
        row, column = self.shared.frod_s_indices.get_buffer(self.category).to(self.U.device)
        return torch.diag(self.frod_lambda_l - self.s).index_put((row, column), self.frod_lambda_s_values)

    def delta(self) -> Tensor:
        return self.U.to(self.frod_lambda_l) @ self.change() @ self.V.T.to(self.frod_lambda_l)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.dropout(x) @ self.V.to(x) @ self.change().T @ self.U.T.to(x)

    def expected_parameters(self) -> int:
        return self.target.in_features + self.config.entries(self.target.in_features)


@dataclass(kw_only=True)
class FrodConfig(LayerConfig):
    projection_prng_key: int = 0
    """Seed of the places of S."""
    save_projection: bool = True
    """Write V and the places into the file too; False: decomposed again, which other machines may do otherwise."""
    frod_dropout: float = 0.0
    """Dropout on the input of the update, in training."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""
    sparse_rate: float = 0.01
    """Share of S that is learned, off the diagonal."""
    regularization_alpha: float = 1e-3
    """Ridge of the joint decomposition, against correlated layers."""
    progressbar: bool = True
    """Of PEFT's; kept for the file."""
    runtime_offload_base_weight: bool = False
    """Of PEFT's; kept for the file."""

    peft_type, adapter, learning_rate = Name("FROD"), FRoD, 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, 1, "frod_dropout")
        if not 0 <= self.sparse_rate <= 1:
            raise ConfigError(f"sparse_rate must lie between 0 and 1, not {self.sparse_rate}")

    def entries(self, n: int) -> int:
        """How many entries of S (n, n) are learned."""
        return min(max(int(n * n * self.sparse_rate), int(self.sparse_rate > 0)), n * (n - 1))

    def build_shared(self, targets: Sequence[Target]) -> Basis:
        return Basis(self, {target.path: target for target in targets})
