"""AdapterFusion: learn, for each token, how much to use of what other trained adapters add.

    y' = y + sum_i a_i V u_i,  a = softmax_i((Q y + q)^T (K u_i + k)),  u_i: what adapter i adds to y

Pfeiffer et al., 2021, arXiv:2005.00247. Trainable: 3 d^2 + 2 d for each place that all the adapters share; these stay
as they are, and inactive. Not mergeable. Starts with V = I and nearly equal shares, so not as a no-op. The file holds
Q, K, V and the adapters' names: load those first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Matrix
from ..core.config import LayerConfig, Name, check_range
from ..core.context import state_of
from ..core.target import Target
from ..errors import ConfigError, TargetError, VeneerError


class Fusion(Adapter):
    kinds = frozenset({"linear", "block"})

    def __init__(self, config: AdapterFusionConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        if any(part.has_pre or not part.has_post for adapter in self.siblings() for part in adapter.parts):
            names = ", ".join(config.adapter_names)
            raise TargetError(f"a fusion reads what adapters add to an output; one of {names} acts elsewhere")
        d = target.out_features
        self.fusion_query, self.fusion_key = nn.Linear(d, d), nn.Linear(d, d)
        for layer in (self.fusion_query, self.fusion_key):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.fusion_value = Matrix(d, d) if config.value else None
        if self.fusion_value is not None:
            nn.init.eye_(self.fusion_value.weight)
        self.dropout = nn.Dropout(config.dropout_prob)

    def siblings(self) -> Iterator[Adapter]:
        """The parts of each adapter it reads, as one."""
        for name in self.config.adapter_names:
            adapter = self.target.layer.adapters.get(name)
            if adapter is None:
                raise VeneerError(f"a fusion reads adapter {name!r}: not on {self.target.path!r}; load or add it first")
            yield adapter

    def updates(self, x: Tensor, y: Tensor) -> Tensor:
        """u: (..., adapters, width)."""
        found = []
        for adapter in self.siblings():
            z = y
            for part in adapter.parts:
                dtype = part.dtype or y.dtype
                z = part.post(x.to(dtype), z.to(dtype))
            found.append(z.to(y.dtype) - y)
        return torch.stack(found, dim=-2)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        u = self.updates(x, y)
        scores = (self.fusion_key(u) * self.fusion_query(y).unsqueeze(-2)).sum(-1)
        mixed = (self.dropout(scores).softmax(-1).unsqueeze(-1) * u).sum(-2)
        return y + (mixed if self.fusion_value is None else mixed @ self.fusion_value.weight.T)

    def expected_parameters(self) -> int:
        d = self.target.out_features
        return 2 * (d * d + d) + d * d * self.config.value

    def describe(self) -> str:
        return " + ".join(self.config.adapter_names)


@dataclass(kw_only=True)
class AdapterFusionConfig(LayerConfig):
    adapter_names: list[str] = field(default_factory=list)
    """The adapters to fuse, by their names on the model."""
    value: bool = True
    """Learn V; False: V = I."""
    regularization: bool = True
    """Add |V - I|^2 / 100 to the loss."""
    dropout_prob: float = 0.0
    """Dropout on the scores, in training."""

    peft_type, adapter = Name("FUSION"), Fusion
    learning_rate = 5e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.adapter_names)) < 2:
            raise ConfigError(f"adapter_names must name the adapters to fuse, two or more, not {self.adapter_names}")
        check_range(self, 0, 1, "dropout_prob")

    def fill_targets(self, model: nn.Module) -> None:
        state = state_of(model)
        for name in self.adapter_names:
            if state is None or name not in state.configs:
                known = ", ".join(state.configs) if state else "none"
                raise TargetError(f"a fusion reads adapter {name!r}; add or load it first (the model has {known})")
        paths = [set(state.adapters(name)) for name in self.adapter_names]  # type: ignore[union-attr]
        shared = set.intersection(*paths)
        self.target_modules = [path for path in state.layers if path in shared]  # type: ignore[union-attr]
        if not shared:
            raise TargetError(f"{', '.join(self.adapter_names)} have no module in common that they all adapt")

    def before(self, shared: nn.Module | None, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        """The facts of the adapters it reads, which are not active themselves."""
        state = state_of(model)
        for name in self.adapter_names if state is not None else ():
            for member in state.configs[name].members() if name in state.configs else ():  # type: ignore[union-attr]
                member.before(state.shared.get(name), facts, model, kwargs)  # type: ignore[union-attr]

    def loss(self, adapters: Sequence[Adapter]) -> Tensor | None:
        if not self.value or not self.regularization:
            return None
        values = [p.fusion_value.weight for adapter in adapters for p in adapter.parts if isinstance(p, Fusion)]
        return 0.01 * torch.stack([V.square().sum() - 2 * V.diagonal().sum() + len(V) for V in values]).sum()
