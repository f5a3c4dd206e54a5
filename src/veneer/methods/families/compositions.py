"""Methods that combine other adapters of the model: shared code of AdapterFusion, averages and splits.

These are AdapterHub's compositions. A stack is `set_adapter(["a", "b"])`. A fusion, an average or a split is a method
whose config names the adapters that it reads. `parallel` runs the same rows through several adapters.
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
    """An adapter that combines the outputs of other adapters on its module, which stay unchanged and inactive."""

    def __init__(self, config: ReaderConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        check_present(config, target.layer.state.configs)
        self.names = [name for name in config.adapter_names if name in target.layer.adapters]
        parts: list[Adapter] = []
        for name in self.names:
            parts += self.sibling(name).parts
        self.has_fold = type(self).has_fold and all(part.has_fold for part in parts)
        self.reads_weight = not all(map(_follows, parts))
        for part in parts:
            has_output = _follows(part) or part.has_fold
            if part.target is not target or not has_output:
                names = ", ".join(self.names)
                raise TargetError(
                    f"{config.title} reads the outputs of adapters on {target.path!r}; one of {names} has no output"
                )

    def sibling(self, name: str) -> Adapter:
        """The adapter called `name` on the same module."""
        adapter = self.target.layer.adapters.get(name)
        if adapter is None:
            raise VeneerError(
                f"{self.config.title} reads adapter {name!r}, not found on {self.target.path!r}; add or load it first"
            )
        return adapter

    def update(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """u: what the adapter called `name` adds to the output y for the input x."""
        output = self._output(self.sibling(name).parts, x, y)
        return output.to(y.dtype) - y

    def _output(self, parts: Sequence[Adapter], x: Tensor, y: Tensor) -> Tensor:
        """The module's output with the parts applied; if possible, they are applied to its output y."""
        if not all(map(_follows, parts)):
            return self._output_folded(parts, x)
        output = y
        for part in parts:
            dtype = part.dtype or y.dtype
            part_x = x.to(dtype) if x.is_floating_point() else x
            output = part.run(part_x) if isinstance(part, Replace) else part.post(part_x, output.to(dtype))
        return output

    def _output_folded(self, parts: Sequence[Adapter], x: Tensor) -> Tensor:
        """The module's output with the parts folded into its weight."""
        W, b = self.target.layer.fold(parts)
        if self.target.kind != "embedding":
            x = x.to(W.dtype)
        return self.target.op(x, W, b)


def _follows(part: Adapter) -> bool:
    """Whether the adapter needs only the module's output, or replaces the module."""
    return isinstance(part, Replace) or (part.has_post and not part.has_pre)


@dataclass(kw_only=True)
class ReaderConfig(LayerConfig):
    adapter_names: list[str] = field(default_factory=list)
    """The adapters to read, by their names on the model."""

    title: ClassVar[str]
    """The method's name in error messages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.adapter_names)) < max(2, len(self.adapter_names)):
            raise ConfigError(f"adapter_names must name two different adapters or more, not {self.adapter_names}")

    def fill_targets(self, model: nn.Module) -> None:
        self.target_modules = self.places(model)

    def places(self, model: nn.Module) -> list[str]:
        """The paths that at least one of the adapters adapts, in the model's order."""
        state = state_of(model)
        check_present(self, () if state is None else state.configs)
        assert state is not None  # the check found adapters
        for name in self.adapter_names:
            if not state.adapters(name):
                raise TargetError(f"{self.title} reads the outputs of adapters on modules; {name!r} adapts none")
        names = set(self.adapter_names)
        return [path for path, layer in state.layers.items() if not names.isdisjoint(layer.adapters)]

    def before(self, shared: nn.Module | None, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        """Compute the facts of the adapters to read, because nothing else does while they are inactive."""
        state = state_of(model)
        if state is None:
            return
        for name in self.adapter_names:
            if name in state.configs:
                for member in state.configs[name].members():
                    member.before(state.shared.get(name), facts, model, kwargs)


def check_present(config: ReaderConfig, known: Collection[str]) -> None:
    """Raise TargetError unless the model has all the adapters that `config` reads."""
    for name in config.adapter_names:
        if name not in known:
            there = ", ".join(known) or "none"
            raise TargetError(f"{config.title} reads adapter {name!r}; add or load it first (the model has {there})")


class Weighted(Reader):
    """A reader with one weight for each adapter, fixed or learned."""

    kinds = frozenset({"linear", "conv", "embedding", "norm", "block"})

    def __init__(self, config: WeightedConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        initial = dict(zip(config.adapter_names, config.initial_weights(), strict=True))
        weights = torch.tensor([initial[name] for name in self.names])
        self.composition_weights = nn.Parameter(weights, requires_grad=config.learned)

    def learned(self) -> list[nn.Parameter]:
        return super().learned() if self.config.learned else []

    def expected_parameters(self) -> int:
        return len(self.names) * self.config.learned

    def describe(self) -> str:
        return " + ".join(self.names)


@dataclass(kw_only=True)
class WeightedConfig(ReaderConfig):
    weights: list[float] | None = None
    """The weight of each adapter; None: 1 for each."""
    learned: bool = False
    """Train the weights; there is one for each adapter and module."""

    learning_rate = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None and len(self.weights) != len(self.adapter_names):
            raise ConfigError(f"weights has {len(self.weights)} entries for {len(self.adapter_names)} adapter_names")

    def initial_weights(self) -> list[float]:
        return self.weights or [1.0] * len(self.adapter_names)


def parallel(batch: Mapping[str, Any], adapter_names: Sequence[str]) -> dict[str, Any]:
    """Repeat a batch so that each adapter sees every row: `model(**parallel(batch, ["one", "two"]))`.

    A tensor (rows, ...) becomes (adapters x rows, ...): all rows for the first adapter, then all rows for the second.
    Outputs have the same layout. The base model runs once. The name "__base__" stands for the model without adapters.
    The result can also be passed to `model.generate`.
    """
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    row_counts = set(map(len, tensors.values()))
    if len(row_counts) != 1 or not adapter_names:
        raise VeneerError(
            "parallel needs adapters, and tensors with as many rows as one another; it got adapters "
            f"{list(adapter_names)} and tensors with {sorted(row_counts)} rows"
        )
    rows = row_counts.pop()
    repeated = dict(batch)
    for key, tensor in tensors.items():
        repeated[key] = torch.cat([tensor] * len(adapter_names))
    names: list[str] = []
    for name in adapter_names:
        names += [name] * rows
    repeated["adapter_names"] = names
    return repeated
