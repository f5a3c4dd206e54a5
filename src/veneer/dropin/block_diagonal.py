"""A linear layer with a block-diagonal weight, PEFT's class of BD-LoRA's factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..targets.target import Matrix


class BlockDiagonalLinear(nn.Module):
    """A linear layer with a block-diagonal weight, held as its blocks on top of each other, (out, in / n).

    Raises:
        ValueError: the number of blocks does not divide the sizes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        init_zero: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if in_features % nblocks or out_features % nblocks:
            raise ValueError(f"{nblocks} blocks do not divide {in_features} inputs and {out_features} outputs")
        self.in_features = in_features
        self.out_features = out_features
        self.nblocks = nblocks
        self.weight = nn.Parameter(torch.zeros(out_features, in_features // nblocks, dtype=dtype, device=device))
        if not init_zero:
            nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (self.nblocks, -1))  # (..., blocks, in / n)
        blocks = self.weight.unflatten(0, (self.nblocks, -1))  # (blocks, out / n, in / n)
        return torch.einsum("...bi,boi->...bo", groups, blocks).flatten(-2)

    def weight_as_blockdiagonal_matrix(self) -> Tensor:
        return torch.block_diag(*self.weight.chunk(self.nblocks))


class Factor(BlockDiagonalLinear):
    """A factor of BD-LoRA, which its adapter reads in its own way."""

    matrix = Matrix.matrix

    def _get_name(self) -> str:
        return "BlockDiagonalLinear"


def as_blocks(matrix: Matrix, count: int) -> None:
    """Turn a factor, (out, in / count), into a block-diagonal layer in place; its weight stays the same Parameter."""
    out_features, width = matrix.weight.shape
    matrix.__class__ = Factor  # type: ignore[assignment]
    matrix.in_features = width * count  # type: ignore[assignment]
    matrix.out_features = out_features  # type: ignore[assignment]
    matrix.nblocks = count  # type: ignore[assignment]
