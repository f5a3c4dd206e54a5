"""AdapterFusion: learn how much each token uses of what other trained adapters add.

    y' = y + sum_i a_i V u_i,  a = softmax_i((Q y + q)^T (K u_i + k)),  u_i: what adapter i adds to y

Pfeiffer et al., 2021, arXiv:2005.00247. Trainable: 3 d^2 + 2 d for each module that all the adapters adapt. The
adapters themselves stay frozen and inactive. Not mergeable. Starts with V = I and nearly equal shares, which is not a
no-op. The file holds Q, K, V and the names of the adapters, which must be loaded first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import Name, check_range
from ..core.state import state_of
from ..errors import TargetError
from ..targets.target import Matrix, Target
from .families.compositions import Reader, ReaderConfig


class Fusion(Reader):
    kinds = frozenset({"linear", "block"})

    def __init__(self, config: AdapterFusionConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        for name in config.adapter_names:
            self.sibling(name)
        d = target.out_features
        self.fusion_query = nn.Linear(d, d)
        self.fusion_key = nn.Linear(d, d)
        for layer in (self.fusion_query, self.fusion_key):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.fusion_value = Matrix(d, d) if config.value else None
        if self.fusion_value is not None:
            nn.init.eye_(self.fusion_value.weight)
        self.dropout = nn.Dropout(config.dropout_prob)

    def updates(self, x: Tensor, y: Tensor) -> Tensor:
        """u: (..., adapters, width)."""
        updates = [self.update(name, x, y) for name in self.config.adapter_names]
        return torch.stack(updates, dim=-2)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        u = self.updates(x, y)
        keys = self.fusion_key(u)
        query = self.fusion_query(y).unsqueeze(-2)
        scores = (keys * query).sum(-1)
        shares = self.dropout(scores).softmax(-1)
        mixed = (shares.unsqueeze(-1) * u).sum(-2)
        if self.fusion_value is not None:
            mixed = mixed @ self.fusion_value.weight.T
        return y + mixed

    def expected_parameters(self) -> int:
        d = self.target.out_features
        query_and_key = 2 * (d * d + d)
        value = d * d if self.config.value else 0
        return query_and_key + value

    def describe(self) -> str:
        return " + ".join(self.config.adapter_names)


@dataclass(kw_only=True)
class AdapterFusionConfig(ReaderConfig):
    value: bool = True
    """Learn V; False: V stays the identity."""
    regularization: bool = True
    """Add |V - I|^2 / 100 to the loss."""
    dropout_prob: float = 0.0
    """Dropout on the scores during training."""

    peft_type = Name("FUSION")
    adapter = Fusion
    title = "a fusion"
    learning_rate = 5e-5
    example = {"adapter_names": ["one", "two"]}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, 1, "dropout_prob")

    def places(self, model: nn.Module) -> list[str]:
        """The modules that all of the adapters adapt."""
        paths = super().places(model)
        layers: Any = state_of(model).layers  # type: ignore[union-attr]
        shared = [path for path in paths if self.are_all_in(layers[path].adapters)]
        if not shared:
            raise TargetError(f"{', '.join(self.adapter_names)} have no module in common")
        return shared

    def are_all_in(self, adapters: Collection[str]) -> bool:
        return all(name in adapters for name in self.adapter_names)

    def loss(self, adapters: Sequence[Adapter]) -> Tensor | None:
        if not self.value or not self.regularization:
            return None
        penalties = []
        for adapter in adapters:
            for part in adapter.parts:
                if isinstance(part, Fusion):
                    penalties.append(_distance_from_identity(part.fusion_value.weight))
        return 0.01 * torch.stack(penalties).sum()


def _distance_from_identity(V: Tensor) -> Tensor:
    """|V - I|^2, without forming the difference."""
    return V.square().sum() - 2 * V.diagonal().sum() + len(V)
