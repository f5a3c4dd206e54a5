"""BOFT: turn the input by a product of sparse rotations that together reach every entry, and scale the output.

    W' = diag(s) W M^T,  M = M_n ... M_1,  M_i = P_i diag(R_i1, R_i2, ...) P_i^T,  R the Cayley transform of a skew Q

P_i deals the entries so that blocks of M_i span twice the reach of those of M_(i-1). Liu et al., 2023,
arXiv:2311.06243. Trainable: n in b + out per target (the file keeps all b^2 entries of a block, of which the skew part
counts). Mergeable. Starts as a no-op: Q is zero, s is one; s leaves the bias alone. PEFT takes n = 1 where it cannot
compile for CUDA, whatever is asked, and knows square convolutions only.
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
    reads_weight = True  # the scale leaves the bias alone, so `post` must know the bias below

    def __init__(self, config: BOFTConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.has_pre = self.has_post = target.kind == "linear"  # a convolution's columns are patches
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
        return self.drop(cayley((Q - Q.mT) / 2), self.config.boft_dropout).view_as(self.boft_R)

    def drop(self, R: Tensor, p: float) -> Tensor:
        """In training, leave a random share p of the blocks of one random factor unrotated."""
        if not self.training or p == 0:
            return R
        factor = torch.randint(self.factors, (1,), device=R.device)
        still = factor * self.blocks + torch.randperm(self.blocks, device=R.device)[: int(p * self.blocks)]
        eye = torch.eye(self.size, device=R.device, dtype=R.dtype)
        return R.index_copy(0, still, eye.expand(len(still), -1, -1))

    def pre(self, x: Tensor) -> Tensor:
        return butterfly(x, self.rotations())

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        b, s = self.target.bias(), self.boft_s.flatten()
        return y * s if b is None else torch.lerp(b.to(y.dtype), y, s)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.boft_s.flatten().to(W.dtype)
        return butterfly(W, self.rotations().to(W.dtype), inverse=True) * scale[:, None], b

    def expected_parameters(self) -> int:
        return self.factors * self.target.in_features * self.size + self.target.out_features

    def describe(self) -> str:
        return f"{self.factors} x {self.blocks} blocks of {self.size}"


@dataclass(kw_only=True)
class BOFTConfig(LayerConfig):
    boft_block_size: int = 4
    """Size b of a block, which divides in of every target; 0 when the number of blocks is given."""
    boft_block_num: int = 0
    """Number of blocks, likewise; 0 when their size is given."""
    boft_n_butterfly_factor: int = 1
    """Sparse rotations in the product, n. Each after the first doubles the reach: the size must be even and the
    number of blocks a multiple of 2^(n - 1)."""
    boft_dropout: float = 0.0
    """Share of the blocks of one sparse rotation left out in a training step."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""

    peft_type, adapter = Name("BOFT"), BOFT
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        size, number = self.boft_block_size, self.boft_block_num
        if (size == 0) == (number == 0) or min(size, number) < 0:
            raise ConfigError(
                "give either boft_block_size or boft_block_num, the other 0; "
                f"not boft_block_size = {size} and boft_block_num = {number}"
            )
        check_range(self, 1, 64, "boft_n_butterfly_factor")
        check_range(self, 0, 1, "boft_dropout")

    def blocks_for(self, target: Target) -> tuple[int, int]:
        """Number and size of the blocks on a target."""
        width, n = target.in_features, self.boft_n_butterfly_factor
        name = "boft_block_size" if self.boft_block_size else "boft_block_num"
        given = getattr(self, name)
        if width % given:
            raise ConfigError(f"{name} {given} on {target.path!r} must divide its in = {width}")
        number, size = (width // given, given) if self.boft_block_size else (given, width // given)
        if n > 1 and (size % 2 or number % 2 ** (n - 1)):
            raise ConfigError(
                f"boft_n_butterfly_factor {n} on {target.path!r} needs blocks of even size whose number is a multiple "
                f"of {2 ** (n - 1)}, not {number} of {size}"
            )
        return number, size
