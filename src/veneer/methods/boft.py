"""BOFT: rotate the input by a product of sparse rotations that together mix all entries, and scale the output.

    W' = diag(s) W M^T,  M = M_n ... M_1,  M_i = P_i diag(R_i1, R_i2, ...) P_i^T,  R the Cayley transform of a skew Q

The permutation P_i makes the blocks of M_i span twice the range of those of M_(i-1). Liu et al., 2023,
arXiv:2311.06243. Trainable: n in b + out per target; the file stores all b^2 entries of a block, of which only the
skew-symmetric part has an effect. Mergeable. Starts as a no-op: Q is zero and s is one. s does not scale the bias. PEFT
always uses n = 1 if it cannot compile its CUDA extension, and supports only convolutions with square kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError
from ..maths.butterfly import butterfly
from ..maths.cayley import cayley
from ..targets.target import Target


class BOFT(Adapter):
    kinds = frozenset({"linear", "conv"})
    reads_weight = True  # `post` must know the bias, which is not scaled

    def __init__(self, config: BOFTConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        acts_on_vectors = target.kind == "linear"  # a convolution's columns are patches
        self.has_pre = acts_on_vectors
        self.has_post = acts_on_vectors
        self.factors = config.boft_n_butterfly_factor
        self.blocks, self.size = config.blocks_for(target)
        shape = (1, target.out_features) if target.kind == "conv" else (target.out_features, 1)
        self.boft_R = nn.Parameter(torch.zeros(self.factors, self.blocks, self.size, self.size))
        self.boft_s = nn.Parameter(torch.ones(shape))
        if not config.init_weights:
            nn.init.normal_(self.boft_R, std=0.1)
            nn.init.normal_(self.boft_s, mean=1, std=0.1)

    def rotations(self) -> Tensor:
        """The orthogonal blocks, (n, blocks, size, size)."""
        Q = self.boft_R.flatten(0, 1)
        skew = (Q - Q.mT) / 2
        R = self.drop(cayley(skew), self.config.boft_dropout)
        return R.view_as(self.boft_R)

    def drop(self, R: Tensor, p: float) -> Tensor:
        """During training, replace a random share p of the blocks of one random factor by the identity."""
        if not self.training or p == 0:
            return R
        factor = torch.randint(self.factors, (1,), device=R.device)
        order = torch.randperm(self.blocks, device=R.device)
        dropped = factor * self.blocks + order[: int(p * self.blocks)]
        identity = torch.eye(self.size, device=R.device, dtype=R.dtype)
        return R.index_copy(0, dropped, identity.expand(len(dropped), -1, -1))

    def pre(self, x: Tensor) -> Tensor:
        return butterfly(x, self.rotations())

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        b = self.target.bias()
        s = self.boft_s.flatten()
        if b is None:
            return y * s
        return torch.lerp(b.to(y.dtype), y, s)  # b + s (y - b)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.boft_s.flatten().to(W.dtype)
        rotations = self.rotations().to(W.dtype)
        return butterfly(W, rotations, inverse=True) * scale[:, None], b

    def expected_parameters(self) -> int:
        return self.factors * self.target.in_features * self.size + self.target.out_features

    def describe(self) -> str:
        return f"{self.factors} x {self.blocks} blocks of {self.size}"


@dataclass(kw_only=True)
class BOFTConfig(LayerConfig):
    boft_block_size: int = 4
    """Size b of a block; must divide the input size of every target. 0 if boft_block_num is given."""
    boft_block_num: int = 0
    """Number of blocks; must divide the input size of every target. 0 if boft_block_size is given."""
    boft_n_butterfly_factor: int = 1
    """n: number of sparse rotations in the product. Each one after the first doubles the range that is mixed; the block
    size must then be even and the number of blocks a multiple of 2^(n - 1)."""
    boft_dropout: float = 0.0
    """Share of the blocks of one sparse rotation that are dropped in a training step."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""

    peft_type = Name("BOFT")
    adapter = BOFT
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.boft_block_size
        number = self.boft_block_num
        if (size == 0) == (number == 0) or min(size, number) < 0:
            raise ConfigError(
                "give either boft_block_size or boft_block_num, the other 0; "
                f"not boft_block_size = {size} and boft_block_num = {number}"
            )
        check_range(self, 1, 64, "boft_n_butterfly_factor")
        check_range(self, 0, 1, "boft_dropout")

    def blocks_for(self, target: Target) -> tuple[int, int]:
        """The number and the size of the blocks on a target."""
        width = target.in_features
        n = self.boft_n_butterfly_factor
        if self.boft_block_size:
            self.check_divides("boft_block_size", target)
            size = self.boft_block_size
            number = width // size
        else:
            self.check_divides("boft_block_num", target)
            number = self.boft_block_num
            size = width // number
        if n > 1 and (size % 2 or number % 2 ** (n - 1)):
            raise ConfigError(
                f"boft_n_butterfly_factor {n} on {target.path!r} needs blocks of even size whose number is a multiple "
                f"of {2 ** (n - 1)}, not {number} of {size}"
            )
        return number, size

    def check_divides(self, name: str, target: Target) -> None:
        value = getattr(self, name)
        if target.in_features % value:
            raise ConfigError(f"{name} {value} on {target.path!r} must divide its in = {target.in_features}")
