"""BitFit: train the biases of the model, and nothing else.

    W' = W,  b' learned, starting at b

Ben Zaken et al., 2021, arXiv:2106.10199. Trainable: out per target; by default every module with a bias is a target,
including norms. Mergeable. Starts as a no-op. The file holds the whole trained biases, under their names in the model.
PEFT has no such method; the closest is `bias="all"` together with another method.
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
                f"{target.path!r} has no bias to train; "
                "name other modules in target_modules, or leave it None for all that have a bias"
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
    peft_type = Name("BITFIT")
    adapter = BitFit
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias != "none":
            raise ConfigError(f"BitFit trains the biases of its targets; bias = {self.bias!r} has no place beside it")

    def fill_targets(self, model: nn.Module) -> None:
        saved = saved_modules(model, self)
        modules = {}
        paths = []
        for path, module in walk(model):
            if is_within(path, saved):
                continue
            modules[path] = module
            if has_bias(module):
                paths.append(path)
        if not paths:
            raise TargetError(f"{type(model).__name__} has no module with a bias for BitFit to train")
        self.target_modules = endings(paths, modules)


def is_within(path: str, parents: list[str]) -> bool:
    """Whether a path is one of `parents` or below one."""
    return any(path == parent or path.startswith(parent + ".") for parent in parents)


def has_bias(module: nn.Module) -> bool:
    if module._parameters.get("bias") is None:
        return False
    return kind_of(module).kind in BitFit.kinds
