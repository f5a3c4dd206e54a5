"""OFT: rotate blocks of the input, or of an embedding's output, by learned orthogonal matrices.

    W' = W R^T,  x R: each block of x times its rotation R_i, the Cayley transform of a skew-symmetric Q_i

Qiu et al., 2023, arXiv:2306.07280; the input side and the Neumann series: Qiu et al., 2025, arXiv:2506.19847.
Trainable: blocks x size (size - 1) / 2 per target. Mergeable. Starts as a no-op: Q is zero. PEFT merges several
adapters in a different order from the one in which its forward pass applies them; here the orders agree.
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
        self.has_pre = target.kind == "linear"  # the columns of a convolution's weight are patches: only fold applies
        self.has_post = target.kind == "embedding"
        width = target.out_features if self.has_post else target.in_features
        self.size = config.size_for(width)
        self.blocks = width // self.size
        rotations = 1 if config.block_share else self.blocks
        R = Matrix(rotations, self.size * (self.size - 1) // 2)
        if self.has_post:  # the file uses another name for embeddings
            self.oft_embedding_R = R
        else:
            self.oft_R = R
        if config.init_weights:
            nn.init.zeros_(R.weight)
        else:
            nn.init.kaiming_uniform_(R.weight, a=math.sqrt(5))

    def rotations(self) -> Tensor:
        """The orthogonal matrix of each block: (blocks, size, size)."""
        config = self.config
        parameter = self.oft_embedding_R if self.has_post else self.oft_R
        Q = skew(parameter.weight, self.size)
        if config.coft:
            Q = self.constrain(Q)
        R = cayley_neumann(Q, config.num_cayley_neumann_terms) if config.use_cayley_neumann else cayley(Q)
        R = R.expand(self.blocks, -1, -1)
        return self.drop(R, config.module_dropout)

    def constrain(self, Q: Tensor) -> Tensor:
        """Project each matrix onto COFT's ball. The projection itself is not differentiated."""
        limit = self.config.eps / len(Q) ** 0.5
        norms = Q.norm(dim=(1, 2), keepdim=True)
        factors = (limit / norms.clamp_min(1e-30)).clamp_max(1)
        projected = Q * factors
        return Q + (projected - Q).detach()

    def drop(self, R: Tensor, p: float) -> Tensor:
        """During training, replace a random share p of the rotations by the identity."""
        if not self.training or p == 0 or len(R) == 1:
            return R
        count = int(p * len(R))
        dropped = torch.randperm(len(R), device=R.device)[:count]
        eye = torch.eye(R.shape[-1], device=R.device, dtype=R.dtype)
        return R.index_copy(0, dropped, eye.expand(count, -1, -1))

    def rotate(self, x: Tensor, R: Tensor) -> Tensor:
        """Multiply each block of x by its matrix of R."""
        blocks = x.unflatten(-1, (self.blocks, self.size))
        rotated = torch.einsum("...bi,bij->...bj", blocks, R)
        return rotated.flatten(-2)

    def pre(self, x: Tensor) -> Tensor:
        return self.rotate(x, self.rotations())

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rotate(y, self.rotations())

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        R = self.rotations().to(W.dtype)
        if self.has_post:
            return self.rotate(W.T, R).T, b
        return self.rotate(W, R.mT), b

    def describe(self) -> str:
        return f"{self.blocks} blocks of {self.size}"


@dataclass(kw_only=True)
class OFTConfig(LayerConfig):
    r: int = 0
    """Number of blocks; 0 if `oft_block_size` is given."""
    oft_block_size: int = 32
    """Size of a block; 0 if `r` is given. Whichever is given is replaced by the nearest divisor of the width."""
    module_dropout: float = 0.0
    """Share of the blocks that are not rotated in a training step."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""
    coft: bool = False
    """Keep the rotations small, by constraining the norm of Q (COFT)."""
    eps: float = 6e-5
    """Bound on the norm of Q with `coft`."""
    block_share: bool = False
    """Share one rotation between all blocks."""
    use_cayley_neumann: bool = True
    """Approximate the Cayley transform by a Neumann series, which needs no matrix inverse."""
    num_cayley_neumann_terms: int = 5
    """Number of terms of the series."""

    peft_type = Name("OFT")
    adapter = OFT

    def __post_init__(self) -> None:
        super().__post_init__()
        is_ambiguous = (self.r == 0) == (self.oft_block_size == 0)
        if is_ambiguous or min(self.r, self.oft_block_size) < 0:
            raise ConfigError(
                f"give either r (number of blocks) or oft_block_size, the other 0; "
                f"not r = {self.r} and oft_block_size = {self.oft_block_size}"
            )
        check_range(self, 0, 1, "module_dropout")
        check_range(self, 2, math.inf, "num_cayley_neumann_terms")

    def size_for(self, width: int) -> int:
        """The block size for a width, from the divisor that is nearest to the config's number (of two, the smaller)."""
        asked = self.oft_block_size or self.r
        divisors = [d for d in range(1, width + 1) if width % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - asked))  # `min` returns the first of two, the smaller
        return nearest if self.oft_block_size else width // nearest
