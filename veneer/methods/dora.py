"""DoRA: learn the magnitude of each output apart from the direction, which LoRA updates.

    W' = m (W + s B A) / |W + s B A|,  the norm over each row, held constant in the backward pass

Liu et al., 2024, arXiv:2402.09353, section 4.3 for the constant norm. Trainable: r (in + out) + out per target.
Mergeable. Starts as a no-op: m is the norm of W. Unlike PEFT, dropout falls on the low-rank part alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..core.target import Target
from ..variants import Composition
from .lora import LoRA, LoraConfig


class DoRA(LoRA):
    kinds = frozenset({"linear", "conv", "embedding"})
    reads_weight = True

    def __init__(self, config: LoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        W = target.weight().float()
        magnitude = (W if self.matrices()[0].is_meta else W + self.delta().to(W)).norm(dim=1)
        shape = (1, -1, *(1,) * target.spatial) if target.kind == "conv" else (-1,)
        self.lora_magnitude_vector = nn.Parameter(magnitude.detach().view(shape))

    def scale(self, W: Tensor) -> Tensor:
        """m / |W + dW|, (out,)."""
        norm = (W.to(self.dtype) + self.delta()).detach().norm(dim=1)
        return self.lora_magnitude_vector.flatten() / norm

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        b = self.target.bias()
        b = None if b is None else self.target.channels(b.to(y.dtype), y)
        out = super().post(x, y if b is None else y - b)
        out = out * self.target.channels(self.scale(self.target.weight()), y)
        return out if b is None else out + b

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
