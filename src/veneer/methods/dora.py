"""DoRA: learn the magnitude of each output apart from the direction, which LoRA updates.

    W' = m (W + s B A) / |W + s B A|,  the norm over each row, held constant in the backward pass

Liu et al., 2024, arXiv:2402.09353, section 4.3 for the constant norm. Trainable: r (in + out) + out per target.
Mergeable, but on convolutions with groups, where the norm is PEFT's, of W and the factors multiplied without regard to
groups. Starts as a no-op: m is the norm of W. Unlike PEFT, dropout falls on the low-rank part alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..targets.target import Target
from .families.variants import Composition
from .lora import LoRA, LoraConfig


class DoRA(LoRA):
    kinds = frozenset({"linear", "conv", "embedding"})
    reads_weight = True

    def __init__(self, config: LoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        W = target.weight().float()
        magnitude = (W if self.matrices()[0].is_meta else W + self.change().to(W)).norm(dim=1)
        shape = (1, -1, *(1,) * target.spatial) if target.kind == "conv" else (-1,)
        self._squares: tuple[tuple[int, ...], Tensor] | None = None
        self.lora_magnitude_vector = nn.Parameter(magnitude.detach().view(shape))

    def change(self) -> Tensor:
        """dW, (out, in); of a convolution with groups, whose update is no weight, the factors' product as if it was."""
        if self.target.groups == 1:
            return self.delta()
        A, B = self.factors()
        return (B.reshape(-1, A.shape[0]) @ A).view(self.target.out_features, -1)

    def scale(self, W: Tensor) -> Tensor:
        """m / |W + dW|, (out,)."""
        norm = (W.to(self.dtype) + self.change()).detach().norm(dim=1)
        return self.lora_magnitude_vector.flatten() / norm

    @torch.no_grad()
    def squares(self, W: Tensor) -> Tensor:
        """|W|^2 of a weight that changes seldom, (out,): it is kept until W is another or has been written to."""
        if torch.compiler.is_compiling():
            return self.target.as_matrix(W).to(self.dtype).square().sum(1)
        key = (id(W), W.data_ptr(), W._version)
        if self._squares is None or self._squares[0] != key:
            self._squares = key, self.target.as_matrix(W).to(self.dtype).square().sum(1)
        return self._squares[1]

    @torch.no_grad()
    def norm(self) -> Tensor:
        """|W + B A|, (out,), without forming the sum: |W|^2 + 2 <W A^T, B> + <B A A^T, B>."""
        direct = self.target.direct()
        if direct is None or type(self).delta is not LoRA.delta:
            return (self.target.weight().to(self.dtype) + self.change()).norm(dim=1)
        W, (A, B) = direct[0].to(self.dtype), self.factors()
        cross = (W @ A.T).mul_(2).addmm_(B, A @ A.T)
        return (self.squares(self.target.base.weight) + (cross * B).sum(1)).clamp_min(0).sqrt()

    def finish(self, z: Tensor) -> Tensor:
        b, vector = self.target.bias(), self.target.channels
        scale = self.lora_magnitude_vector.flatten() / self.target.once(self, self.norm)
        z = super().finish(z)
        if b is None:
            return z * vector(scale, z)
        return torch.addcmul(vector(b.to(z.dtype) * (1 - scale), z), z, vector(scale, z))

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.scale(W).to(W.dtype)
        return super().fold(W, b)[0] * scale[:, None], b

    def expected_parameters(self) -> int:
        return super().expected_parameters() + self.target.out_features


@dataclass(kw_only=True)
class DoraConfig(LoraConfig):
    """`LoraConfig(use_dora=True)` under a name of its own."""

    use_dora: bool = True

    adapter = Composition(DoRA)  # type: ignore[assignment]
