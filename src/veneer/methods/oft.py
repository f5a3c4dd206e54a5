"""OFT: rotate blocks of the input, of an embedding those of the output, by learned orthogonal matrices.

    W' = W R^T,  x R: each block of x times its rotation R_i, the Cayley transform of a skew-symmetric Q_i

Qiu et al., 2023, arXiv:2306.07280; the input side and the Neumann series: Qiu et al., 2025, arXiv:2506.19847.
Trainable: blocks x size (size - 1) / 2 per target. Mergeable. Starts as a no-op: Q is zero. PEFT merges several
adapters in another order than its own forward pass; here both are the forward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError
from ..maths.cayley import cayley, cayley_neumann, skew
from ..targets.target import Matrix, Target


class OFT(Adapter):
    kinds = frozenset({"linear", "conv", "embedding"})

    def __init__(self, config: OFTConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.has_pre = target.kind == "linear"  # a convolution's columns are patches: it has the weight form only
        self.has_post = target.kind == "embedding"
        width = target.out_features if self.has_post else target.in_features
        self.size = config.size_for(width)
        self.blocks = width // self.size
        R = Matrix(1 if config.block_share else self.blocks, self.size * (self.size - 1) // 2)
        setattr(self, "oft_embedding_R" if self.has_post else "oft_R", R)  # the file's names
        with torch.no_grad():
            R.weight.zero_() if config.init_weights else nn.init.kaiming_uniform_(R.weight, a=5**0.5)

    def rotations(self) -> Tensor:
        """One orthogonal matrix for each block: (blocks, size, size)."""
        config = self.config
        Q = skew((self.oft_embedding_R if self.has_post else self.oft_R).weight, self.size)
        if config.coft:
            limit = config.eps / len(Q) ** 0.5
            inside = Q * (limit / Q.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)).clamp_max(1)
            Q = Q + (inside - Q).detach()  # a projection: the gradient is that at the projected point
        R = cayley_neumann(Q, config.num_cayley_neumann_terms) if config.use_cayley_neumann else cayley(Q)
        return self.drop(R.expand(self.blocks, -1, -1), config.module_dropout)

    def drop(self, R: Tensor, p: float) -> Tensor:
        """In training, leave a random share p of the blocks unrotated."""
        if not self.training or p == 0 or len(R) == 1:
            return R
        still = torch.randperm(len(R), device=R.device)[: int(p * len(R))]
        eye = torch.eye(R.shape[-1], device=R.device, dtype=R.dtype)
        return R.index_copy(0, still, eye.expand(len(still), -1, -1))

    def rotate(self, x: Tensor, R: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (self.blocks, self.size))
        return torch.einsum("...bi,bij->...bj", blocks, R).flatten(-2)

    def pre(self, x: Tensor) -> Tensor:
        return self.rotate(x, self.rotations())

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rotate(y, self.rotations())

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        R = self.rotations().to(W.dtype)
        return (self.rotate(W.T, R).T if self.has_post else self.rotate(W, R.mT)), b

    def describe(self) -> str:
        return f"{self.blocks} blocks of {self.size}"


@dataclass(kw_only=True)
class OFTConfig(LayerConfig):
    r: int = 0
    """Number of blocks; 0 when their size is given."""
    oft_block_size: int = 32
    """Size of a block; 0 when their number is given. The nearest divisor of the width is taken."""
    module_dropout: float = 0.0
    """Share of the blocks left unrotated in a training step."""
    init_weights: bool = True
    """Start at no rotation; False: random (for tests)."""
    coft: bool = False
    """Keep the rotations small: Q within `eps`."""
    eps: float = 6e-5
    """How far `coft` lets them go."""
    block_share: bool = False
    """One rotation for all blocks."""
    use_cayley_neumann: bool = True
    """The series instead of the exact transform, which needs a matrix inverse."""
    num_cayley_neumann_terms: int = 5
    """Length of the series."""

    peft_type, adapter = Name("OFT"), OFT

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r == 0) == (self.oft_block_size == 0) or min(self.r, self.oft_block_size) < 0:
            raise ConfigError(
                f"give either r (number of blocks) or oft_block_size, the other 0; "
                f"not r = {self.r} and oft_block_size = {self.oft_block_size}"
            )
        check_range(self, 0, 1, "module_dropout")
        check_range(self, 2, math.inf, "num_cayley_neumann_terms")

    def size_for(self, width: int) -> int:
        """The block size on an input of `width`: the divisor of it nearest to what was asked, the smaller of two."""
        asked = self.oft_block_size or self.r
        divisors = [d for d in range(1, width + 1) if width % d == 0]
        nearest = min(divisors, key=lambda d: (abs(d - asked), d))
        return nearest if self.oft_block_size else width // nearest
