"""QA-LoRA: A reads the inputs in groups, so that the update can be merged into a weight quantised in groups.

    W' = W + s B A P,  P x = (in / L) mean of each L consecutive inputs,  A (r, in / L)

Xu et al., 2023, arXiv:2309.14717. Trainable: r (in / L + out) per target. Mergeable. Starts as a no-op: B is zero. In
the paper P is a sum, L times the mean; in PEFT's files, and so here, it is the number of groups times the mean. PEFT
supports it on GPTQ layers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.config import check_range
from ..errors import ConfigError, TargetError
from ..targets.target import Matrix
from .families.variants import Composition
from .lora import LoRA, LoraConfig


class QALoRA(LoRA):
    kinds = frozenset({"linear"})

    @classmethod
    def check(cls, config: Any) -> None:
        check_range(config, 1, math.inf, "qalora_group_size")
        if config.init_lora_weights not in (True, False, "gaussian", "mica"):
            raise ConfigError(
                f"use_qalora with init_lora_weights={config.init_lora_weights!r}: A reads groups of inputs only, so it "
                "cannot hold a factor of the weight; use True"
            )

    def make(self) -> tuple[Matrix, Matrix]:
        A, B = super().make()
        size = self.config.qalora_group_size
        width = A.weight.shape[1]
        if width % size:
            raise TargetError(
                f"qalora_group_size {size} does not divide the {width} inputs of A on {self.target.path!r}"
            )
        return Matrix(self.r, width // size), B

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        size = self.config.qalora_group_size
        A = A.repeat_interleave(size, dim=1)  # (r, in)
        return A * (self.target.in_features / size**2), B

    def sizes(self) -> tuple[int, int]:
        size_A, size_B = super().sizes()
        return size_A // self.config.qalora_group_size, size_B


@dataclass(kw_only=True)
class QALoraConfig(LoraConfig):
    """Equivalent to `LoraConfig(use_qalora=True)`."""

    use_qalora: bool = True
    """A reads the inputs in groups of `qalora_group_size`."""

    adapter = Composition(QALoRA)  # type: ignore[assignment]
