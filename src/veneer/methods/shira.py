"""SHiRA: learn the update of a few fixed entries of the weight: a sparse update of high rank.

    W' = W + S,  S zero except r (in + out) entries

Bhardwaj et al., 2024, arXiv:2406.13175 (the paper's random mask, one of five). Trainable: r (in + out) per target, as
many as LoRA of rank r. Mergeable. Starts as a no-op: S is zero. The file also holds the positions of the entries.
Without `random_seed` they come from an unseeded `torch.Generator()`, which draws the same numbers everywhere. For a
custom mask, set `mask_type` to any other name and `config.mask_fn` to a function of (module, r) that returns zeros and
ones in the shape of the module's weight. Unlike in PEFT, GPT-2's Conv1D and convolutions can be targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Additive, Tensors
from ..core.config import LayerConfig, Name, check_range
from ..errors import CheckpointError, ConfigError
from ..maths.sparse import add_product, is_cheaper_sparse, scatter
from ..targets.target import Target


class SHiRA(Additive):
    kinds = frozenset({"linear", "conv"})

    def __init__(self, config: ShiraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.shape = (target.out_features, target.in_features)
        n = config.r * sum(self.shape)
        if n > math.prod(self.shape):
            raise ConfigError(
                f"r = {config.r} on {target.path!r} asks for {n} entries, its weight has {math.prod(self.shape)}; "
                "use a smaller r"
            )
        self.scaling = 1.0
        values = torch.zeros(n) if config.init_weights else torch.randn(n)
        self.shira_weight = nn.Parameter(values)
        indices = torch.empty(2, n, dtype=torch.int32)
        if not indices.is_meta:
            indices = self.choose_indices(n)
        self.register_buffer("shira_indices", indices)

    def choose_indices(self, n: int) -> Tensor:
        """Rows and columns of the n learned entries in row-major order, (2, n)."""
        mask_fn = getattr(self.config, "mask_fn", None)
        mask_type = self.config.mask_type
        if mask_fn is not None:
            is_learned = self._custom_mask(mask_fn, n)
        elif mask_type == "random":
            is_learned = self.config.random_mask(*self.shape, n)
        else:
            raise ConfigError(f'mask_type {mask_type!r} needs a function: set config.mask_fn, or use "random"')
        return is_learned.nonzero().T.int()

    def _custom_mask(self, mask_fn: Callable[[nn.Module, int], Tensor], n: int) -> Tensor:
        """Where the custom mask is one, (out, in). It must be one in exactly n places."""
        stored = mask_fn(self.target.base, self.config.r)
        mask = self.target.as_matrix(stored)
        is_one = mask == 1
        count = int(is_one.sum())
        if mask.shape != self.shape or count != n:
            raise ConfigError(
                f"mask_fn gave {self.target.path!r} a mask of {tuple(mask.shape)} with {count} ones; "
                f"it must be {self.shape} with r (in + out) = {n} ones"
            )
        return is_one

    def entries(self) -> tuple[Tensor, Tensor]:
        """The learned values, and their positions in the flattened weight."""
        rows, columns = self.shira_indices.long()
        positions = rows * self.shape[1] + columns
        return self.shira_weight * self.scaling, positions

    def delta(self) -> Tensor:
        values, positions = self.entries()
        return scatter(values, positions, *self.shape)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        if self.target.kind == "linear" and is_cheaper_sparse(x, self.shira_weight, self.shape[0]):
            values, positions = self.entries()
            return add_product(y, x, values, positions)
        return super().post(x, y)

    def absorb(self, tensors: Tensors) -> None:
        for indices, size in zip(tensors["shira_indices"].long(), self.shape, strict=True):
            if not 0 <= int(indices.min()) <= int(indices.max()) < size:
                raise CheckpointError(f"shira_indices of {self.target.path!r} lie outside its weight {self.shape}")
        super().absorb(tensors)

    def expected_parameters(self) -> int:
        return self.config.r * (self.target.in_features + self.target.out_features)

    def describe(self) -> str:
        return f"r={self.config.r}, {self.shira_weight.numel()} entries"


@dataclass(kw_only=True)
class ShiraConfig(LayerConfig):
    r: int = 32
    """Sets the number of entries, r (in + out); it does not limit the rank of the update."""
    mask_type: str = "random"
    """How the entries are chosen: "random", or any other name for the `mask_fn` that you set."""
    random_seed: int | None = None
    """Seed of the random choice; None: torch's default seed."""
    init_weights: bool = True
    """Start as a no-op; False: normal values (for tests)."""

    peft_type = Name("SHIRA")
    adapter = SHiRA
    learning_rate = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")

    def random_mask(self, rows: int, columns: int, n: int) -> Tensor:
        """A boolean mask with n random entries set, (rows, columns)."""
        generator = torch.Generator(device="cpu")
        if self.random_seed is not None:
            generator.manual_seed(self.random_seed)
        order = torch.randperm(rows * columns, generator=generator, device="cpu")
        mask = torch.zeros(rows * columns, dtype=torch.bool, device="cpu")
        mask[order[:n]] = True
        return mask.view(rows, columns)
