"""Uni-LoRA: one learned vector from which the low-rank factors of all layers are filled.

    W' = W + B A;  all entries of all A and B, in one row: P theta,  P (D, d) with one entry 1 / sqrt(n_j) in each row

Each theta_j stands at n_j random places, n_j being D / d rounded up or down, so that P keeps lengths. Li et al., 2025,
arXiv:2506.00799. Trainable: d for the whole model. Mergeable. Starts near a no-op: theta is small.

As in PEFT, the places come from NumPy's generator over the targets in the model's order, A before B.
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
    """theta, the entries of P, and until the targets have fetched them the places theta stands at."""

    def __init__(self, config: UniLoraConfig, targets: Sequence[Target]) -> None:
        super().__init__()
        bound, d = config.init_theta_d_bound, config.theta_d_length
        theta = torch.empty(d).uniform_(-bound, bound) if config.init_weights else torch.randn(d)
        self.unilora_theta_d = nn.Parameter(theta)
        shapes = [shape for t in targets for shape in ((config.r, t.in_features), (t.out_features, config.r))]
        sizes = [math.prod(shape) for shape in shapes]
        rng = np.random.default_rng(config.proj_seed)
        times, rest = divmod(sum(sizes), d)
        places, numbers = (torch.arange(n, device="cpu").numpy() for n in (sum(sizes), d))
        places[:] = np.concatenate([np.repeat(numbers, times), rng.choice(d, rest, replace=False)])
        rng.shuffle(places)
        counts = torch.from_numpy(np.bincount(places, minlength=d)).clamp_min(1)
        self.register_buffer("scale", counts.float().rsqrt(), persistent=False)
        pieces = torch.from_numpy(places).int().split(sizes)
        pairs = [piece.view(shape).clone() for piece, shape in zip(pieces, shapes, strict=True)]
        self.places = {t.path: pairs[2 * i : 2 * i + 2] for i, t in enumerate(targets)}

    def theta(self) -> Tensor:
        """theta / sqrt(n)."""
        return self.unilora_theta_d * self.scale.to(self.unilora_theta_d)


class UniLoRA(LowRank):
    def __init__(self, config: UniLoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.r
        for side, places in zip("AB", self.shared.places.pop(target.path), strict=True):
            self.register_buffer(f"unilora_indices_{side}", places, persistent=config.save_indices)
        self.set_dropout(config.unilora_dropout)

    @property
    def dtype(self) -> torch.dtype:
        return self.shared.unilora_theta_d.dtype

    def factors(self) -> tuple[Tensor, Tensor]:
        theta = self.shared.theta()
        return theta[self.unilora_indices_A], theta[self.unilora_indices_B]

    def export(self) -> Tensors:
        places = self.state_dict()
        return places | {key.replace("indices", "scales"): self.shared.scale[j] for key, j in places.items()}

    def absorb(self, tensors: Tensors) -> None:
        for key, t in tensors.items():
            if "indices" in key and not 0 <= t.min() <= t.max() < len(self.shared.scale):
                raise CheckpointError(f"{key} on {self.target.path!r} points outside the vector")
        super().absorb({key: t for key, t in tensors.items() if "indices" in key})
        for key, places in self.state_dict().items():
            self.shared.scale[places] = tensors[key.replace("indices", "scales")].to(self.shared.scale)

    def expected_parameters(self) -> int:
        return 0

    def describe(self) -> str:
        return f"r={self.r}"


@dataclass(kw_only=True)
class UniLoraConfig(LayerConfig):
    r: int = 4
    """Rank of the update."""
    proj_seed: int = 42
    """Seed of the places."""
    theta_d_length: int = 256
    """d: length of the learned vector."""
    unilora_dropout: float = 0.0
    """Dropout on the input of the update, in training."""
    init_theta_d_bound: float = 0.02
    """theta starts uniform between minus this and this; zero would never learn."""
    init_weights: bool = True
    """False: normal values (for tests)."""
    save_indices: bool = False
    """Write the places and the entries of P into the file too; False: regenerated from the seed."""

    peft_type, adapter = Name("UNILORA"), UniLoRA
    learning_rate = 2e-2
    recommended = {"theta_d_length": 8192}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "theta_d_length")
        check_range(self, 0, 1, "unilora_dropout")

    def semantic_fields(self) -> list[str]:
        """The places of a target follow from those of the others, of which the tensors say nothing."""
        return [
            *super().semantic_fields(),
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
        ]

    def build_shared(self, targets: Sequence[Target]) -> Vector:
        return Vector(self, targets)
