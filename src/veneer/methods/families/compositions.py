"""What adapters share that stand on other adapters of the model: AdapterFusion, averages, splits.

AdapterHub's compositions: a stack is `set_adapter(["a", "b"])`, a fusion, an average and a split are methods that name
the adapters they read, and `parallel` asks several adapters about the same rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, Replace
from ...core.config import LayerConfig
from ...core.state import state_of
from ...errors import ConfigError, TargetError, VeneerError
from ...targets.target import Target


class Reader(Adapter):
    """An adapter that says what others make of a module's output. They stay as they are, and inactive."""

    def __init__(self, config: ReaderConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        check_present(config, target.layer.state.configs)
        self.names = [name for name in config.adapter_names if name in target.layer.adapters]
        parts = [part for name in self.names for part in self.sibling(name).parts]
        self.has_fold = type(self).has_fold and all(part.has_fold for part in parts)
        self.reads_weight = not all(map(_follows, parts))
        if any(part.target is not target or not (_follows(part) or part.has_fold) for part in parts):
            names = ", ".join(self.names)
            raise TargetError(
                f"{config.title} reads what adapters make of {target.path!r}; one of {names} does not say"
            )

    def sibling(self, name: str) -> Adapter:
        adapter = self.target.layer.adapters.get(name)
        if adapter is None:
            raise VeneerError(
                f"{self.config.title} reads adapter {name!r}: not on {self.target.path!r}; load or add it first"
            )
        return adapter

    def update(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """u: what the adapter called `name` adds to the output y for the input x."""
        parts = self.sibling(name).parts
        if not all(map(_follows, parts)):
            W, b = self.target.layer.fold(parts)
            return self.target.op(x if self.target.kind == "embedding" else x.to(W.dtype), W, b).to(y.dtype) - y
        z = y
        for part in parts:
            dtype = part.dtype or y.dtype
            own = x.to(dtype) if x.is_floating_point() else x
            z = part.run(own) if isinstance(part, Replace) else part.post(own, z.to(dtype))
        return z.to(y.dtype) - y


def _follows(part: Adapter) -> bool:
    """It acts on the module's output alone, or instead of the module."""
    return isinstance(part, Replace) or (part.has_post and not part.has_pre)


@dataclass(kw_only=True)
class ReaderConfig(LayerConfig):
    adapter_names: list[str] = field(default_factory=list)
    """The adapters it reads, by their names on the model."""

    title: ClassVar[str]
    """What an error calls it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.adapter_names)) < max(2, len(self.adapter_names)):
            raise ConfigError(f"adapter_names must name two different adapters or more, not {self.adapter_names}")

    def fill_targets(self, model: nn.Module) -> None:
        self.target_modules = self.places(model)

    def places(self, model: nn.Module) -> list[str]:
        """The paths that one of the adapters adapts at least, in the model's order."""
        state = state_of(model)
        check_present(self, () if state is None else state.configs)
        for name in self.adapter_names:
            if not state.adapters(name):  # type: ignore[union-attr]
                raise TargetError(f"{self.title} reads what adapters make of modules; {name!r} adapts none")
        return [p for p, layer in state.layers.items() if any(n in layer.adapters for n in self.adapter_names)]  # type: ignore[union-attr]

    def before(self, shared: nn.Module | None, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        """The facts of the adapters it reads, which are not active themselves."""
        state = state_of(model)
        for name in self.adapter_names if state is not None else ():
            for member in state.configs[name].members() if name in state.configs else ():  # type: ignore[union-attr]
                member.before(state.shared.get(name), facts, model, kwargs)  # type: ignore[union-attr]


def check_present(config: ReaderConfig, known: Collection[str]) -> None:
    """Raise TargetError unless the model has all the adapters that `config` reads."""
    for name in config.adapter_names:
        if name not in known:
            there = ", ".join(known) or "none"
            raise TargetError(f"{config.title} reads adapter {name!r}; add or load it first (the model has {there})")


class Weighted(Reader):
    """A weight for each adapter it reads, which may be learned."""

    kinds = frozenset({"linear", "conv", "embedding", "norm", "block"})

    def __init__(self, config: WeightedConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        given = dict(zip(config.adapter_names, config.initial_weights(), strict=True))
        self.composition_weights = nn.Parameter(
            torch.tensor([given[name] for name in self.names]), requires_grad=config.learned
        )

    def learned(self) -> list[nn.Parameter]:
        return super().learned() if self.config.learned else []

    def expected_parameters(self) -> int:
        return len(self.names) * self.config.learned

    def describe(self) -> str:
        return " + ".join(self.names)


@dataclass(kw_only=True)
class WeightedConfig(ReaderConfig):
    weights: list[float] | None = None
    """How much of each adapter."""
    learned: bool = False
    """Train the weights, one for each adapter and module."""

    learning_rate = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None and len(self.weights) != len(self.adapter_names):
            raise ConfigError(f"weights has {len(self.weights)} entries for {len(self.adapter_names)} adapter_names")

    def initial_weights(self) -> list[float]:
        return self.weights or [1.0] * len(self.adapter_names)


def parallel(batch: Mapping[str, Any], adapter_names: Sequence[str]) -> dict[str, Any]:
    """A batch that asks each adapter about each row: `model(**parallel(batch, ["one", "two"]))`.

    Tensors (rows, ...) become (adapters x rows, ...), all rows of the first adapter first, and so does what comes back;
    the base model runs once. "__base__" names the model without adapters. For `model.generate` as well.
    """
    rows = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()}
    if len(rows) != 1 or not adapter_names:
        raise VeneerError(
            f"parallel needs adapters and tensors of as many rows each, not {list(adapter_names)}, {sorted(rows)} rows"
        )
    repeated = {
        key: torch.cat([value] * len(adapter_names)) if isinstance(value, Tensor) and value.dim() else value
        for key, value in batch.items()
    }
    return {**repeated, "adapter_names": [name for name in adapter_names for _ in range(*rows)]}
