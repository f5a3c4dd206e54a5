"""Invertible adapters: a coupling after the input embedding, its inverse before the output head, and SeqBn between.

    NICE: u' = u + F(v), v' = v + G(u');  GLOW: u' = e(s) u + t, (s, t) = F(v), v' likewise by G(u');  (u, v) = halves
    e(s) = exp(c 2 / pi atan(s / c)),  c = 5;  F, G: one hidden layer of width / inv_adapter_reduction_factor

Pfeiffer et al., 2020 (MAD-X), arXiv:2005.00052; Dinh et al., 2014, arXiv:1410.8516; Kingma and Dhariwal, 2018,
arXiv:1807.03039. Trainable: about d^2 / 2 once (NICE), and SeqBn's. Not mergeable. Starts as a no-op: F = G = 0.
The coupling acts on the word embeddings alone, which the head is tied to; AdapterHub's on their sum with positions. Its
GLOW block leaves F out; this one does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import Name, check_range
from ..errors import ConfigError, TargetError
from ..maths.activations import ACTIVATIONS
from ..maths.coupling import COUPLINGS, couple, uncouple
from ..targets.roles import head_paths
from ..targets.target import Target
from ..targets.walk import bare, matches, walk
from .families.bottleneck import Bottleneck
from .seq_bn import SeqBnConfig


class Net(nn.Module):
    """F or G."""

    def __init__(self, config: SeqBnInvConfig, width: int, out: int) -> None:
        super().__init__()
        size = max(1, int(width / config.inv_adapter_reduction_factor))
        out = out if config.inv_adapter == "nice" else 2 * out
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, out)
        self.function = ACTIVATIONS[config.non_linearity or "relu"]
        if config.init_weights is not False:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.up(self.function(self.down(h)))


class Coupling(nn.Module):
    """An invertible map of the embedding space."""

    def __init__(self, config: SeqBnInvConfig, width: int) -> None:
        super().__init__()
        half, rest = width // 2, width - width // 2
        self.split = COUPLINGS[config.inv_adapter]
        self.inv_adapter_F, self.inv_adapter_G = Net(config, rest, half), Net(config, half, rest)

    def forward(self, h: Tensor) -> Tensor:
        return couple(h, self.inv_adapter_F, self.inv_adapter_G, self.split)

    def inverse(self, h: Tensor) -> Tensor:
        return uncouple(h, self.inv_adapter_F, self.inv_adapter_G, self.split)


class Enter(Adapter):
    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return self.shared(y)


class Leave(Adapter):
    def pre(self, x: Tensor) -> Tensor:
        return self.shared.inverse(x)


class SeqBnInv(Bottleneck):
    kinds = Bottleneck.kinds | {"embedding"}


@dataclass(kw_only=True)
class SeqBnInvConfig(SeqBnConfig):
    inv_adapter: Literal["nice", "glow"] = "nice"
    """The coupling: "nice" shifts, "glow" also scales."""
    inv_adapter_reduction_factor: int | float = 2
    """Width of half an embedding over that of F's and G's hidden layer."""
    output_modules: list[str] | None = None
    """Of target_modules those that get the inverse; None: the model's head."""

    peft_type, adapter = Name("SEQ_BN_INV"), SeqBnInv
    file_holds_embedding = False
    subsets = ("output_modules",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1e-9, math.inf, "inv_adapter_reduction_factor")
        if self.placement == "parallel":
            raise ConfigError("an invertible adapter goes with sequential ones: placement pfeiffer or houlsby")

    def fill_targets(self, model: Any) -> None:
        super().fill_targets(model)
        modules, words = dict(walk(model)), bare(model.get_input_embeddings()).weight
        heads = sorted(head_paths(model, modules))
        self.output_modules = self.output_modules or heads
        heads = [path for path in heads if any(matches(path, entry) for entry in self.output_modules)]
        embeddings = [p for p, m in modules.items() if isinstance(m, nn.Embedding) and m.weight is words]
        self.target_modules = [*embeddings, *(self.target_modules or ()), *heads]

    def build_shared(self, targets: Sequence[Target]) -> nn.Module:
        widths = {target.out_features for target in targets if target.kind == "embedding"}
        if len(widths) != 1:
            raise TargetError("an invertible adapter needs the input embedding among its targets (and no other)")
        return Coupling(self, *widths)

    def build(self, target: Target, shared: nn.Module | None = None, **kwargs: Any) -> Adapter:
        if target.kind == "embedding":
            return Enter(self, target, shared)
        leaves = any(matches(target.path, entry) for entry in self.output_modules or ())
        return Leave(self, target, shared) if leaves else super().build(target, shared, **kwargs)
