"""GLoRA: scale and shift the frozen weight and bias by learned matrices, vectors or numbers.

    W' = W0 + W0 * A + B,   b' = b0 + b0 * D + E + W0 C,   W0, b0 pretrained

Chavan et al., 2023, arXiv:2306.07967. Trainable with the defaults: 2 r (in + out) + r (in + 1) + 2 per target,
or 2 r (in + out) if the target has no bias. Mergeable. Starts as a no-op: each of A to E, or one of its two factors, is
zero. The paper searches for the best form of each of them; here, as in PEFT, A and B have the same form, and so do D
and E. The file holds zeros for those whose form is "none".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Additive, Bias, Tensors
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError, TargetError
from ..targets.target import Target

PATHS = ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E")


class Path(nn.Module):
    """One of A to E, in one of the forms "lora", "vector", "constant" and "none"."""

    def __init__(self, form: str, shape: tuple[int, ...], r: int, at_zero: bool) -> None:
        super().__init__()
        self.form = form
        self.shape = shape
        self.r = r
        if form == "lora":
            self.Xd = nn.Parameter(torch.zeros(shape[0], r))
            self.Xu = nn.Parameter(torch.empty(r, shape[1]))
            nn.init.kaiming_uniform_(self.Xu, a=math.sqrt(5))
            if not at_zero:
                nn.init.kaiming_uniform_(self.Xd, a=math.sqrt(5))
        elif form != "none":
            ones = (1,) * (len(shape) - 1)
            size = (1,) if form == "constant" else (shape[0], *ones)
            self.X = nn.Parameter(torch.zeros(size) if at_zero else torch.randn(size) * 0.1)

    def value(self) -> Tensor | float:
        """The path's value, which can be broadcast to its shape."""
        if self.form == "none":
            return 0.0
        if self.form == "lora":
            return self.Xd @ self.Xu
        return self.X

    def count(self) -> int:
        """The number of parameters, by formula."""
        if self.form == "none":
            return 0
        if self.form == "lora":
            return self.r * sum(self.shape)
        return 1 if self.form == "constant" else self.shape[0]


class GLoRA(Additive):
    is_dense = True

    def __init__(self, config: GloraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.has_bias = target.bias() is not None
        if not self.has_bias and config.config_A_B == "none":
            raise TargetError(f'{target.path!r} has no bias; with config_A_B = "none" GLoRA changes nothing there')
        form_C = config.config_C if self.has_bias else "none"
        form_D_E = config.config_D_E if self.has_bias else "none"
        in_features = target.in_features
        out_features = target.out_features
        new_path = partial(Path, r=config.r, at_zero=config.init_weights)
        self.glora_A = new_path(config.config_A_B, (out_features, in_features))
        self.glora_B = new_path(config.config_A_B, (out_features, in_features))
        self.glora_C = new_path(form_C, (in_features, 1))
        self.glora_D = new_path(form_D_E, (out_features,))
        self.glora_E = new_path(form_D_E, (out_features,))

    def paths(self) -> dict[str, Path]:
        return {name: getattr(self, name) for name in PATHS}

    def delta(self) -> Tensor:
        return self.target.original_weight().to(self.dtype) * self.glora_A.value() + self.glora_B.value()

    def shift(self) -> Tensor:
        """The change of the bias."""
        b = self.trained_bias().to(self.dtype)
        shift = b * self.glora_D.value() + self.glora_E.value()
        C = self.glora_C.value()
        if not isinstance(C, Tensor):
            return shift
        W = self.target.original_weight().to(self.dtype)
        return shift + (W * C.T).sum(1)

    def trained_bias(self) -> Any:
        """The trained copy of the bias, if the same adapter has one, else the pretrained bias."""
        for adapter in self.target.layer.adapters.values():
            if self in adapter.parts:
                for part in adapter.parts:
                    if isinstance(part, Bias):
                        return part.bias
        return self.target.original_bias()

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        if self.config.config_A_B != "none":
            y = super().post(x, y)
        return y + self.shift() if self.has_bias else y

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        W = W + self.delta().to(W.dtype)
        if b is not None:
            b = b + self.shift().to(b.dtype)
        return W, b

    def export(self) -> Tensors:
        tensors = self.state_dict()
        for name, path in self.paths().items():
            if path.form == "none":
                tensors[f"{name}.zeros"] = torch.zeros(1).expand(path.shape)
        return tensors

    def expected_parameters(self) -> int:
        return sum(path.count() for path in self.paths().values())

    def describe(self) -> str:
        return ", ".join(f"{name[-1]} {path.form}" for name, path in self.paths().items())


@dataclass(kw_only=True)
class GloraConfig(LayerConfig):
    r: int = 8
    """Rank of the matrices whose form is "lora"."""
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    """Form of A and B: a low-rank matrix, one number for each output, a single number, or none."""
    config_C: Literal["lora", "vector", "none"] = "lora"
    """Form of C, which has one number for each input: the product of two factors, a plain vector, or none."""
    config_D_E: Literal["vector", "constant", "none"] = "constant"
    """Form of D and E: one number for each output, a single number, or none."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""

    peft_type = Name("GLORA")
    adapter = GLoRA
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
        if self.config_A_B == self.config_C == self.config_D_E == "none":
            raise ConfigError('config_A_B, config_C and config_D_E are all "none": nothing would train')
