"""Uni-LoRA: fill the low-rank factors of all layers from one learned vector.

    W' = W + B A;  the entries of all A and B as one vector: P theta,  P (D, d) with one entry 1 / sqrt(n_j) in each row

Each theta_j is used at n_j random positions, where n_j is D / d rounded up or down, so that P preserves norms. Li et
al., 2025, arXiv:2506.00799. Trainable: d for the whole model. Mergeable. Starts near a no-op: theta is small.

As in PEFT, the positions come from NumPy's generator, for the targets in the model's order, A before B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..core.adapter import LowRank, Tensors
from ..core.config import LayerConfig, Name, check_range
from ..errors import CheckpointError
from ..targets.target import Target


class Vector(nn.Module):
    """theta and P. Holds the indices of each target into theta until the target's adapter is built."""

    def __init__(self, config: UniLoraConfig, targets: Sequence[Target]) -> None:
        super().__init__()
        bound = config.init_theta_d_bound
        d = config.theta_d_length
        theta = torch.empty(d).uniform_(-bound, bound) if config.init_weights else torch.randn(d)
        self.unilora_theta_d = nn.Parameter(theta)
        shapes = []
        for target in targets:
            shapes.append((config.r, target.in_features))
            shapes.append((target.out_features, config.r))
        sizes = [math.prod(shape) for shape in shapes]
        indices = draw_indices(sum(sizes), d, config.proj_seed)
        counts = torch.from_numpy(np.bincount(indices, minlength=d)).clamp_min(1)
        self.register_buffer("scale", counts.float().rsqrt(), persistent=False)
        pieces = torch.from_numpy(indices).int().split(sizes)
        matrices = [piece.view(shape).clone() for piece, shape in zip(pieces, shapes, strict=True)]
        self.indices: dict[str, tuple[Tensor, Tensor]] = {}
        for target, A, B in zip(targets, matrices[::2], matrices[1::2], strict=True):
            self.indices[target.path] = (A, B)

    def theta(self) -> Tensor:
        """theta / sqrt(n), (d,)."""
        return self.unilora_theta_d * self.scale.to(self.unilora_theta_d)


def draw_indices(total: int, d: int, seed: int) -> np.ndarray:
    """Random indices below d, (total,), each about equally often."""
    rng = np.random.default_rng(seed)
    times, rest = divmod(total, d)
    numbers = torch.arange(d, device="cpu").numpy()
    indices = torch.arange(total, device="cpu").numpy()
    extra = rng.choice(d, rest, replace=False)
    indices[:] = np.concatenate([np.repeat(numbers, times), extra])
    rng.shuffle(indices)
    return indices


class UniLoRA(LowRank):
    def __init__(self, config: UniLoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.r
        indices_A, indices_B = self.shared.indices.pop(target.path)
        self.register_buffer("unilora_indices_A", indices_A, persistent=config.save_indices)
        self.register_buffer("unilora_indices_B", indices_B, persistent=config.save_indices)
        self.set_dropout(config.unilora_dropout)

    @property
    def dtype(self) -> torch.dtype:
        return self.shared.unilora_theta_d.dtype

    def factors(self) -> tuple[Tensor, Tensor]:
        theta = self.shared.theta()
        return theta[self.unilora_indices_A], theta[self.unilora_indices_B]

    def export(self) -> Tensors:
        tensors = dict(self.state_dict())
        for key, indices in self.state_dict().items():
            scale_key = key.replace("indices", "scales")
            tensors[scale_key] = self.shared.scale[indices]
        return tensors

    def absorb(self, tensors: Tensors) -> None:
        scale = self.shared.scale
        new_indices = {key: tensor for key, tensor in tensors.items() if "indices" in key}
        for key, indices in new_indices.items():
            if not 0 <= indices.min() <= indices.max() < len(scale):
                raise CheckpointError(f"{key} on {self.target.path!r} points outside the vector")
        super().absorb(new_indices)
        for key, indices in self.state_dict().items():
            scale_key = key.replace("indices", "scales")
            scale[indices] = tensors[scale_key].to(scale)

    def expected_parameters(self) -> int:
        return 0

    def describe(self) -> str:
        return f"r={self.r}"


@dataclass(kw_only=True)
class UniLoraConfig(LayerConfig):
    r: int = 4
    """Rank of the update."""
    proj_seed: int = 42
    """Seed of the random positions."""
    theta_d_length: int = 256
    """d: length of the learned vector."""
    unilora_dropout: float = 0.0
    """Dropout on the input of the update during training."""
    init_theta_d_bound: float = 0.02
    """Bound b of theta's uniform start in [-b, b]. With a start at zero, theta would never learn."""
    init_weights: bool = True
    """Start theta uniform within `init_theta_d_bound`; False: normal (for tests)."""
    save_indices: bool = False
    """Also write the positions and the entries of P to the file; False: regenerate them from the seed."""

    peft_type = Name("UNILORA")
    adapter = UniLoRA
    learning_rate = 2e-2
    recommended = {"theta_d_length": 8192}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "theta_d_length")
        check_range(self, 0, 1, "unilora_dropout")

    def semantic_fields(self) -> list[str]:
        """Includes the fields that select targets: positions depend on all targets, which the tensors do not show."""
        return [
            *super().semantic_fields(),
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
        ]

    def build_shared(self, targets: Sequence[Target]) -> Vector:
        return Vector(self, targets)
