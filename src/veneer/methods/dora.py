"""DoRA: learn the magnitude of each output separately from the direction, which LoRA updates.

    W' = m (W + s B A) / |W + s B A|,  the norm over each row, held constant in the backward pass

Liu et al., 2024, arXiv:2402.09353; section 4.3 for the constant norm. Trainable: r (in + out) + out per target.
Mergeable, except on grouped convolutions. There, as in PEFT, the norm is that of W plus the product of the factors,
which ignores the groups. Starts as a no-op: m is the norm of W. Unlike in PEFT, dropout applies to the low-rank part
only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..maths.precision import without_autocast
from ..targets.target import Target
from .families.variants import Composition
from .lora import LoRA, LoraConfig


class DoRA(LoRA):
    kinds = frozenset({"linear", "conv", "embedding"})
    reads_weight = True

    def __init__(self, config: LoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        W = target.weight().float()
        A, _ = self.matrices()
        if not A.is_meta:
            W = W + self.change().to(W)
        magnitude = W.norm(dim=1).detach()
        if target.kind == "conv":
            ones = (1,) * target.spatial
            magnitude = magnitude.view(1, -1, *ones)
        self._squares: tuple[tuple[int, ...], Tensor] | None = None
        self.lora_magnitude_vector = nn.Parameter(magnitude)

    def change(self) -> Tensor:
        """dW, (out, in). For a grouped convolution, whose update has no weight form: the product of the factors."""
        if self.target.groups == 1:
            return self.delta()
        A, B = self.factors()
        product = B.reshape(-1, A.shape[0]) @ A
        return product.view(self.target.out_features, -1)

    def scale(self, W: Tensor) -> Tensor:
        """m / |W + dW|, (out,)."""
        updated = W.to(self.dtype) + self.change()
        norm = updated.detach().norm(dim=1)
        return self.lora_magnitude_vector.flatten() / norm

    @torch.no_grad()
    def squares(self, W: Tensor) -> Tensor:
        """|W|^2 of each row, (out,). Cached until W is replaced or written to."""
        if torch.compiler.is_compiling():
            return self.row_squares(W)
        key = (id(W), W.data_ptr(), W._version)
        if self._squares is None or self._squares[0] != key:
            self._squares = key, self.row_squares(W)
        return self._squares[1]

    def row_squares(self, W: Tensor) -> Tensor:
        matrix = self.target.as_matrix(W).to(self.dtype)
        return matrix.square().sum(1)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """|W + B A|, (out,), without forming the sum: |W|^2 + 2 <W A^T, B> + <B A A^T, B>."""
        with without_autocast(self.lora_magnitude_vector):
            return self._norm()

    def _norm(self) -> Tensor:
        direct = self.target.direct()
        if direct is None or type(self).delta is not LoRA.delta:
            updated = self.target.weight().to(self.dtype) + self.change()
            return updated.norm(dim=1)
        W = direct[0].to(self.dtype)
        A, B = self.factors()
        gram = A @ A.T
        cross = (W @ A.T).mul_(2).addmm_(B, gram)
        added = (cross * B).sum(1)
        squares = self.squares(self.target.base.weight) + added
        return squares.clamp_min(0).sqrt()

    def finish(self, z: Tensor) -> Tensor:
        b = self.target.bias()
        scale = self.lora_magnitude_vector.flatten() / self.target.once(self, self.norm)
        z = super().finish(z)
        scale_of_z = self.target.channels(scale, z)
        if b is None:
            return z * scale_of_z
        unscaled_bias = b.to(z.dtype) * (1 - scale)  # z contains b, which must not be scaled
        offset = self.target.channels(unscaled_bias, z)
        return torch.addcmul(offset, z, scale_of_z)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.scale(W).to(W.dtype)
        updated, _ = super().fold(W, b)
        return updated * scale[:, None], b

    def expected_parameters(self) -> int:
        return super().expected_parameters() + self.target.out_features


@dataclass(kw_only=True)
class DoraConfig(LoraConfig):
    """Equivalent to `LoraConfig(use_dora=True)`."""

    use_dora: bool = True

    adapter = Composition(DoRA)  # type: ignore[assignment]
