"""BitFit: train the biases the model has, and nothing else.

    W' = W,  b' learned, starting at b

Ben Zaken et al., 2021, arXiv:2106.10199. Trainable: out per target, by default every module with a bias, norms among
them. Mergeable. Starts as a no-op. The file holds the trained biases whole, under the names they have in the model.
PEFT has no such method; its nearest is `bias="all"` beside another.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..core.adapter import Bias
from ..core.config import LayerConfig, Name
from ..core.select import saved_modules
from ..errors import ConfigError, TargetError
from ..targets.roles import endings
from ..targets.target import Target, kind_of
from ..targets.walk import walk


class BitFit(Bias):
    def __init__(self, config: BitFitConfig, target: Target, shared: nn.Module | None = None) -> None:
        if target.bias() is None:
            raise TargetError(
                f"{target.path!r} has no bias to train; name others in target_modules, or none for all that have one"
            )
        super().__init__(target, beside=False)
        self.config = config

    @property
    def commutes(self) -> bool:
        return True

    def expected_parameters(self) -> int:
        return self.target.out_features

    def describe(self) -> str:
        return f"out={self.bias.numel()}"


@dataclass(kw_only=True)
class BitFitConfig(LayerConfig):
    peft_type, adapter = Name("BITFIT"), BitFit
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias != "none":
            raise ConfigError(f"BitFit trains the biases of its targets; bias = {self.bias!r} has no place beside it")

    def fill_targets(self, model: nn.Module) -> None:
        saved = saved_modules(model, self)
        modules = {p: m for p, m in walk(model) if not any(p == s or p.startswith(s + ".") for s in saved)}
        found = [path for path, module in modules.items() if has_bias(module)]
        if not found:
            raise TargetError(f"{type(model).__name__} has no module with a bias for BitFit to train")
        self.target_modules = endings(found, modules)


def has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None and kind_of(module).kind in BitFit.kinds
