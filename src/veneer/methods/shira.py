"""SHiRA: learn a few entries of the weight itself, at fixed places: sparse, and of high rank.

    W' = W + S,  S zero except r (in + out) entries

Bhardwaj et al., 2024, arXiv:2406.13175 (there the random mask is one of five). Trainable: r (in + out) per target, as
many as LoRA of that rank. Mergeable. Starts as a no-op: the entries are zero. The file holds the places too. Without
`random_seed` they are those of an unseeded `torch.Generator()`, which are the same everywhere. For a mask of your own
give `mask_type` a name and set `config.mask_fn` to a function of (module, r) that returns zeros and ones in the shape
of its weight. Unlike in PEFT, GPT-2's Conv1D and convolutions are targets too.
"""

from __future__ import annotations

import math
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
        self.shape = target.out_features, target.in_features
        n = config.r * sum(self.shape)
        if n > math.prod(self.shape):
            raise ConfigError(
                f"r = {config.r} on {target.path!r} asks for {n} entries, its weight has {math.prod(self.shape)}; "
                "use a smaller r"
            )
        self.scaling = 1.0
        self.shira_weight = nn.Parameter(torch.zeros(n) if config.init_weights else torch.randn(n))
        indices = torch.empty(2, n, dtype=torch.int32)
        self.register_buffer("shira_indices", indices if indices.is_meta else self.chosen(n))

    def chosen(self, n: int) -> Tensor:
        """Row and column of each learned entry, row by row: (2, n)."""
        mask_fn = getattr(self.config, "mask_fn", None)
        if mask_fn is None and self.config.mask_type != "random":
            name = self.config.mask_type
            raise ConfigError(f'mask_type {name!r} needs a function: set config.mask_fn, or use "random"')
        if mask_fn is None:
            return self.config.random_mask(*self.shape, n).nonzero().T.int()
        mask = self.target.as_matrix(mask_fn(self.target.base, self.config.r))
        if mask.shape != self.shape or int((mask == 1).sum()) != n:
            raise ConfigError(
                f"mask_fn gave {self.target.path!r} a mask of {tuple(mask.shape)} with {int((mask == 1).sum())} ones; "
                f"it must be {self.shape} with r (in + out) = {n} ones"
            )
        return (mask == 1).nonzero().T.int()

    def entries(self) -> tuple[Tensor, Tensor]:
        """(values, flat places)."""
        rows, columns = self.shira_indices.long()
        return self.shira_weight * self.scaling, rows * self.shape[1] + columns

    def delta(self) -> Tensor:
        return scatter(*self.entries(), *self.shape)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        if self.target.kind == "linear" and is_cheaper_sparse(x, self.shira_weight, self.shape[0]):
            return add_product(y, x, *self.entries())
        return super().post(x, y)

    def absorb(self, tensors: Tensors) -> None:
        rows, columns = tensors["shira_indices"].long()
        if not all(int(i.min()) >= 0 and int(i.max()) < n for i, n in zip((rows, columns), self.shape, strict=True)):
            raise CheckpointError(f"shira_indices of {self.target.path!r} lie outside its weight {self.shape}")
        super().absorb(tensors)

    def expected_parameters(self) -> int:
        return self.config.r * (self.target.in_features + self.target.out_features)

    def describe(self) -> str:
        return f"r={self.config.r}, {self.shira_weight.numel()} entries"


@dataclass(kw_only=True)
class ShiraConfig(LayerConfig):
    r: int = 32
    """Decides the number of entries, r (in + out); it does not limit the update's rank."""
    mask_type: str = "random"
    """How the entries are chosen: "random", or any name for the `mask_fn` you set."""
    random_seed: int | None = None
    """Seed of the random choice; None: torch's default."""
    init_weights: bool = True
    """Start as a no-op; False: normal values (for tests)."""

    peft_type, adapter = Name("SHIRA"), SHiRA
    learning_rate = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")

    def random_mask(self, rows: int, columns: int, n: int) -> Tensor:
        generator = torch.Generator(device="cpu")
        if self.random_seed is not None:
            generator.manual_seed(self.random_seed)
        mask = torch.zeros(rows * columns, dtype=torch.bool, device="cpu")
        mask[torch.randperm(rows * columns, generator=generator, device="cpu")[:n]] = True
        return mask.view(rows, columns)
