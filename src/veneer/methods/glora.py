"""GLoRA: scale and shift the frozen weight and bias, each by a matrix of low rank, a vector, a number, or not at all.

    W' = W0 + W0 * A + B,   b' = b0 + b0 * D + E + W0 C,   W0, b0 pretrained

Chavan et al., 2023, arXiv:2306.07967. Trainable by the defaults: 2 r (in + out) + r (in + 1) + 2 per target, without a
bias 2 r (in + out). Mergeable. Starts as a no-op: a factor of each path is zero. The paper searches each path's form;
here, as in PEFT, A and B have one in common, D and E another. A path that is off is zeros in the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Additive, Bias, Tensors
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError, TargetError
from ..targets.target import Target


class Path(nn.Module):
    """One of A to E."""

    def __init__(self, form: str, shape: tuple[int, ...], r: int, at_zero: bool) -> None:
        super().__init__()
        self.form, self.shape, self.r = form, shape, r
        if form == "lora":
            self.Xd = nn.Parameter(torch.zeros(shape[0], r))
            self.Xu = nn.Parameter(torch.empty(r, shape[1]))
            for factor in (self.Xu,) if at_zero else (self.Xu, self.Xd):
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        elif form != "none":
            size = (1,) if form == "constant" else (shape[0], *(1,) * len(shape[1:]))
            self.X = nn.Parameter(torch.zeros(size) if at_zero else torch.randn(size) * 0.1)

    def value(self) -> Tensor | float:
        """What spreads to the path's shape."""
        if self.form == "none":
            return 0.0
        return self.Xd @ self.Xu if self.form == "lora" else self.X

    def count(self) -> int:
        return {"lora": self.r * sum(self.shape), "vector": self.shape[0], "constant": 1, "none": 0}[self.form]


class GLoRA(Additive):
    is_dense = True

    def __init__(self, config: GloraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.has_bias = target.bias() is not None
        if not self.has_bias and config.config_A_B == "none":
            raise TargetError(f'{target.path!r} has no bias; with config_A_B = "none" GLoRA changes nothing there')
        C, D = (config.config_C, config.config_D_E) if self.has_bias else ("none", "none")
        out_features, in_features = target.out_features, target.in_features
        shapes = [(out_features, in_features)] * 2 + [(in_features, 1)] + [(out_features,)] * 2
        for name, form, shape in zip("ABCDE", [config.config_A_B] * 2 + [C, D, D], shapes, strict=True):
            setattr(self, f"glora_{name}", Path(form, shape, config.r, config.init_weights))

    def paths(self) -> dict[str, Path]:
        return {f"glora_{name}": getattr(self, f"glora_{name}") for name in "ABCDE"}

    def delta(self) -> Tensor:
        return self.target.original_weight().to(self.dtype) * self.glora_A.value() + self.glora_B.value()

    def shift(self) -> Tensor:
        """What is added to the bias."""
        W, b, C = self.target.original_weight().to(self.dtype), self.trained_bias().to(self.dtype), self.glora_C.value()
        shift = b * self.glora_D.value() + self.glora_E.value()
        return shift + (W * C.T).sum(1) if isinstance(C, Tensor) else shift

    def trained_bias(self) -> Any:
        """The pretrained bias, or the copy of it that trains under the same name."""
        own = next(a for a in self.target.layer.adapters.values() if any(part is self for part in a.parts))
        trained = [part.bias for part in own.parts if isinstance(part, Bias)]
        return trained[0] if trained else self.target.original_bias()

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        y = y if self.config.config_A_B == "none" else super().post(x, y)
        return y + self.shift() if self.has_bias else y

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.delta().to(W.dtype), None if b is None else b + self.shift().to(b.dtype)

    def export(self) -> Tensors:
        off = {name: path for name, path in self.paths().items() if path.form == "none"}
        return self.state_dict() | {f"{name}.zeros": torch.zeros(1).expand(path.shape) for name, path in off.items()}

    def expected_parameters(self) -> int:
        return sum(path.count() for path in self.paths().values())

    def describe(self) -> str:
        return ", ".join(f"{name[-1]} {path.form}" for name, path in self.paths().items())


@dataclass(kw_only=True)
class GloraConfig(LayerConfig):
    r: int = 8
    """Rank of the paths that are "lora"."""
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    """Form of A and B: of low rank, one number for each output, one number, or off."""
    config_C: Literal["lora", "vector", "none"] = "lora"
    """Form of C, which has a number for each input; "lora" writes it as a product."""
    config_D_E: Literal["vector", "constant", "none"] = "constant"
    """Form of D and E: one number for each output, one number, or off."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""

    peft_type, adapter = Name("GLORA"), GLoRA
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
        if self.config_A_B == self.config_C == self.config_D_E == "none":
            raise ConfigError('config_A_B, config_C and config_D_E are all "none": nothing would train')
