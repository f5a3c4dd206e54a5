"""AdaMSS's importance of subspaces, as PEFT's layers show it, and the flags of those that it freezes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..methods.adamss import AdaMSS, Allocation


class ByAdapter(Mapping[str, "list[Tensor | None]"]):
    """An average of A (side 0) or B (side 1) for each subspace, by adapter name; None for those that have none yet."""

    def __init__(self, layer: Any, side: int, attribute: str) -> None:
        self.layer = layer
        self.side = side
        self.attribute = attribute

    def __getitem__(self, name: str) -> list[Tensor | None]:
        if name not in self.layer.adapters:
            raise KeyError(name)
        averages = self.layer._allocation(name).averages
        values: list[Tensor | None] = []
        for k in range(len(self.layer._subspaces(name).adamss_A)):
            pair = averages.get((self.layer.path, k))
            values.append(None if pair is None else getattr(pair[self.side], self.attribute))
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.layer.adapters)

    def __len__(self) -> int:
        return len(self.layer.adapters)


class WithImportance:
    """Methods of AdaMSS's layers only: the importance of each subspace, a list by adapter name."""

    @property
    def exp_avg_ipt_A(self) -> ByAdapter:
        return self._averages(0, "sensitivity")

    @property
    def exp_avg_ipt_B(self) -> ByAdapter:
        return self._averages(1, "sensitivity")

    @property
    def exp_avg_unc_A(self) -> ByAdapter:
        return self._averages(0, "uncertainty")

    @property
    def exp_avg_unc_B(self) -> ByAdapter:
        return self._averages(1, "uncertainty")

    def _averages(self, side: int, attribute: str) -> ByAdapter:
        return ByAdapter(self, side, attribute)

    def _subspaces(self: Any, name: str) -> AdaMSS:
        return next(part for part in self.parts(name) if isinstance(part, AdaMSS))

    def _allocation(self: Any, name: str) -> Allocation:
        """What decides on the subspaces of an adapter: of the whole model, or without `use_asa` of this layer alone."""
        schedule = self.state.schedules.get(name)
        if schedule is not None:
            return schedule.steps
        alone = self.__dict__.setdefault("importance", {})
        return alone.setdefault(name, Allocation(self.state.configs[name], {self.path: self._subspaces(name)}))

    @torch.no_grad()
    def update_importance(
        self: Any, adapter_name: str, importance_beta: float = 0.85, uncertainty_beta: float = 0.85
    ) -> None:
        """Include the current gradients of this layer."""
        if adapter_name not in self.adapters:
            return
        allocation = self._allocation(adapter_name)
        here = Allocation(copy.copy(allocation.config), {self.path: self._subspaces(adapter_name)})
        here.config.asa_importance_beta = importance_beta
        here.config.asa_uncertainty_beta = uncertainty_beta
        here.averages = allocation.averages
        here.frozen = allocation.frozen
        here.observe()

    def reset_importance(self: Any, adapter_name: str) -> None:
        averages = self._allocation(adapter_name).averages
        for key in [key for key in averages if key[0] == self.path]:
            del averages[key]

    @torch.no_grad()
    def get_delta_bias(self: Any, adapter_name: str) -> Tensor | None:
        """What an adapter adds to the bias; None if the module has none."""
        part = self._subspaces(adapter_name)
        if not part.moves_bias:
            return None
        nothing = torch.zeros_like(part.pretrained())
        _, bias = part.fold(nothing[:, :-1], nothing[:, -1])
        return bias


class WithAllocation:
    """Methods of AdaMSS's tuner only."""

    def update_and_allocate(self: Any, global_step: int) -> None:
        """Choose the subspaces that keep learning; as in PEFT, the others require no gradients from then on."""
        super().update_and_allocate(global_step)  # type: ignore[misc]
        for schedule in self.state.schedules.values():
            subspaces = schedule.steps.subspaces()
            for key in schedule.steps.frozen:
                for parameter in subspaces[key]:
                    parameter.requires_grad_(False)
