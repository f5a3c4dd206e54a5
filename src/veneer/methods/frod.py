"""FRoD: decompose the weights of all layers in a shared basis, and learn their scales and a sparse rotation of them.

    W = U diag(s) V^T,  W' = U (diag(l) + S) V^T,  l learned from s, S sparse at random places, zero at the start

V (in, in) is shared by the modules of one category (as in PEFT, the last two parts of the path). Wan et al., 2025,
arXiv:2512.23485. Trainable: in + sparse_rate in^2 per target. Mergeable. Starts as a no-op. Unlike in PEFT, U is always
computed from the V in the file, and only the difference from W is added, so that the start is exactly a no-op.
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
    """V and the places of S for each category of modules, shared by the adapters."""

    def __init__(self, config: FrodConfig, targets: dict[str, Target]) -> None:
        super().__init__()
        self.frod_V = nn.Module()
        self.frod_s_indices = nn.Module()
        self.frod_s_size = nn.Module()
        self.members: list[FRoD] = []
        check_widths(targets)
        from_file = config.save_projection and torch.empty(0).is_meta
        generator = torch.Generator(device="cpu").manual_seed(config.projection_prng_key)
        for name, paths in by_category(targets).items():
            n = targets[paths[0]].in_features
            if from_file:
                V = torch.empty(n, n)
            else:
                weights = (targets[path].original_weight().detach().float().cpu() for path in paths)
                V = joint_basis(weights, config.regularization_alpha)
            places = off_diagonal(n, config.entries(n), generator)
            size = torch.tensor([n, n], device="cpu")
            is_saved = config.save_projection
            self.frod_V.register_buffer(name, V.contiguous(), persistent=is_saved)
            self.frod_s_indices.register_buffer(name, places.contiguous(), persistent=is_saved)
            self.frod_s_size.register_buffer(name, size, persistent=is_saved)

    def absorb(self, tensors: Tensors) -> None:
        has_placeholders = any(t.is_meta for t in self.state_dict().values())
        self.load_state_dict(tensors, strict=False, assign=has_placeholders)
        if not tensors:
            return
        for member in self.members:
            member.decompose()


def check_widths(targets: dict[str, Target]) -> None:
    """Raise TargetError unless the inputs of all modules of a category have the same size."""
    for name, paths in by_category(targets).items():
        n = targets[paths[0]].in_features
        for path, target in targets.items():
            if category(path) == name and target.in_features != n:
                raise TargetError(f"{paths[0]!r} and {path!r} share a basis, but their inputs differ in size")


class FRoD(Additive):
    def __init__(self, config: FrodConfig, target: Target, shared: Basis | None = None) -> None:
        super().__init__(config, target, shared)
        n = target.in_features
        self.category = category(target.path)
        self.dropout = nn.Dropout(config.frod_dropout)
        self.register_buffer("U", None, persistent=False)
        self.register_buffer("s", torch.empty(n), persistent=False)
        self.shared.members.append(self)
        if not self.V.is_meta:
            self.decompose()
        self.frod_lambda_l = nn.Parameter(self.s.clone())
        self.frod_lambda_s_values = nn.Parameter(torch.zeros(config.entries(n)))
        if not config.init_weights:
            for parameter in self.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)

    @property
    def V(self) -> Tensor:
        return self.shared.frod_V.get_buffer(self.category)

    def decompose(self) -> None:
        """Compute U and s from the pretrained weight and V."""
        self.U, self.s = left_vectors(self.target.original_weight().detach(), self.V)

    def change(self) -> Tensor:
        """diag(l - s) + S, (in, in)."""
        places = self.shared.frod_s_indices.get_buffer(self.category)
        row, column = places.to(self.U.device)
        diagonal = torch.diag(self.frod_lambda_l - self.s)
        return diagonal.index_put((row, column), self.frod_lambda_s_values)

    def delta(self) -> Tensor:
        U = self.U.to(self.frod_lambda_l)
        V = self.V.to(self.frod_lambda_l)
        return U @ self.change() @ V.T

    def term(self, x: Tensor) -> Tensor:
        U = self.U.to(x)
        V = self.V.to(x)
        return self.dropout(x) @ V @ self.change().T @ U.T

    def expected_parameters(self) -> int:
        return self.target.in_features + self.config.entries(self.target.in_features)


@dataclass(kw_only=True)
class FrodConfig(LayerConfig):
    projection_prng_key: int = 0
    """Seed of the places of S."""
    save_projection: bool = True
    """Save V and the places of S; False: recompute them at load, where V may differ between machines."""
    frod_dropout: float = 0.0
    """Dropout on the input of the update during training."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""
    sparse_rate: float = 0.01
    """Share of the entries of S that are learned; all of them are off the diagonal."""
    regularization_alpha: float = 1e-3
    """Ridge term of the joint decomposition, for correlated layers."""
    progressbar: bool = True
    """Ignored; kept for PEFT compatibility."""
    runtime_offload_base_weight: bool = False
    """Ignored; kept for PEFT compatibility."""

    peft_type = Name("FROD")
    adapter = FRoD
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, 1, "frod_dropout")
        if not 0 <= self.sparse_rate <= 1:
            raise ConfigError(f"sparse_rate must lie between 0 and 1, not {self.sparse_rate}")

    def entries(self, n: int) -> int:
        """How many entries of S (n, n) are learned."""
        least = 1 if self.sparse_rate > 0 else 0
        count = int(n * n * self.sparse_rate)
        return min(max(count, least), n * (n - 1))

    def build_shared(self, targets: Sequence[Target]) -> Basis:
        return Basis(self, {target.path: target for target in targets})
