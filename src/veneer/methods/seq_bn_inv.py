"""SeqBnInv: an invertible coupling layer after the input embedding, its inverse before the head, and SeqBn in between.

    NICE: u' = u + F(v), v' = v + G(u');  GLOW: u' = e(s) u + t, (s, t) = F(v), v' likewise by G(u');  (u, v) = halves
    e(s) = exp(c 2 / pi atan(s / c)),  c = 5;  F, G: one hidden layer of width / inv_adapter_reduction_factor

Pfeiffer et al., 2020 (MAD-X), arXiv:2005.00052; Dinh et al., 2014, arXiv:1410.8516; Kingma and Dhariwal, 2018,
arXiv:1807.03039. Trainable: about d^2 / 2 once (NICE), and SeqBn's. Not mergeable. Starts as a no-op: F = G = 0. The
coupling acts only on the word embeddings, because the head is tied to them; in AdapterHub it acts on their sum with the
position embeddings. AdapterHub's GLOW block does not apply F; ours does.
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
    """F or G: an MLP with one hidden layer."""

    def __init__(self, config: SeqBnInvConfig, width: int, out: int) -> None:
        super().__init__()
        hidden = max(1, int(width / config.inv_adapter_reduction_factor))
        if config.inv_adapter == "glow":
            out = 2 * out  # scales and shifts
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, out)
        self.function = ACTIVATIONS[config.non_linearity or "relu"]
        if config.init_weights is not False:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.up(self.function(self.down(h)))


class Coupling(nn.Module):
    """An invertible map of the embedding space, shared by the embedding and the head."""

    def __init__(self, config: SeqBnInvConfig, width: int) -> None:
        super().__init__()
        half = width // 2
        rest = width - half
        self.split = COUPLINGS[config.inv_adapter]
        self.inv_adapter_F = Net(config, rest, half)
        self.inv_adapter_G = Net(config, half, rest)

    def forward(self, h: Tensor) -> Tensor:
        return couple(h, self.inv_adapter_F, self.inv_adapter_G, self.split)

    def inverse(self, h: Tensor) -> Tensor:
        return uncouple(h, self.inv_adapter_F, self.inv_adapter_G, self.split)


class Enter(Adapter):
    """Applies the coupling to the output of the input embedding."""

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return self.shared(y)


class Leave(Adapter):
    """Applies the inverse to the input of the head."""

    def pre(self, x: Tensor) -> Tensor:
        return self.shared.inverse(x)


class SeqBnInv(Bottleneck):
    kinds = Bottleneck.kinds | {"embedding"}


@dataclass(kw_only=True)
class SeqBnInvConfig(SeqBnConfig):
    inv_adapter: Literal["nice", "glow"] = "nice"
    """The coupling: "nice" shifts, "glow" also scales."""
    inv_adapter_reduction_factor: int | float = 2
    """Half the width of an embedding divided by the width of F's and G's hidden layer."""
    output_modules: list[str] | None = None
    """The target modules that get the inverse; None: the model's head."""

    peft_type = Name("SEQ_BN_INV")
    adapter = SeqBnInv
    file_holds_embedding = False
    subsets = ("output_modules",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1e-9, math.inf, "inv_adapter_reduction_factor")
        if self.placement == "parallel":
            raise ConfigError("an invertible adapter requires sequential ones: placement pfeiffer or houlsby")

    def fill_targets(self, model: Any) -> None:
        super().fill_targets(model)
        modules = dict(walk(model))
        words = bare(model.get_input_embeddings()).weight
        embeddings = []
        for path, module in modules.items():
            if isinstance(module, nn.Embedding) and module.weight is words:
                embeddings.append(path)
        heads = sorted(head_paths(model, modules))
        self.output_modules = self.output_modules or heads
        heads = [path for path in heads if self._has_inverse(path)]
        self.target_modules = [*embeddings, *(self.target_modules or ()), *heads]

    def _has_inverse(self, path: str) -> bool:
        return any(matches(path, entry) for entry in self.output_modules or ())

    def build_shared(self, targets: Sequence[Target]) -> nn.Module:
        widths = {target.out_features for target in targets if target.kind == "embedding"}
        if len(widths) != 1:
            raise TargetError("an invertible adapter needs the input embedding among its targets (and no other)")
        return Coupling(self, *widths)

    def build(self, target: Target, shared: nn.Module | None = None, **kwargs: Any) -> Adapter:
        if target.kind == "embedding":
            return Enter(self, target, shared)
        if self._has_inverse(target.path):
            return Leave(self, target, shared)
        return super().build(target, shared, **kwargs)
