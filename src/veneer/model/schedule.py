"""Schedules that run during training without a call by the user, such as AdaLoRA's rank allocation.

torch calls a global hook after every optimizer step; a schedule runs if that optimizer updates its adapter.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..core.state import State

_followed: weakref.WeakSet[Schedule] = weakref.WeakSet()
_hook: Any = None


class Schedule:
    """One adapter's schedule on one model."""

    def __init__(self, state: State, name: str, steps: Any) -> None:
        self.state = state
        self.name = name
        self.steps = steps
        self.taken = 0
        self.by_hand = False
        _watch(self)

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        """Restore a copied or unpickled schedule, and register it for the training of its model."""
        self.__dict__.update(attributes)
        _watch(self)

    def step(self, n: int | None = None) -> None:
        """Run the schedule after optimizer step `n`, counted from 1; by default the next one."""
        self.taken = self.taken + 1 if n is None else n
        self.steps.step(self.taken)

    def belongs_to(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer holds at least one parameter of the adapter."""
        own_ids = {id(parameter) for parameter in self.state.parameters(self.name)}
        return any(not own_ids.isdisjoint(map(id, group["params"])) for group in optimizer.param_groups)


def follow(state: State, name: str) -> None:
    """Start an adapter's schedule, if its method has one."""
    adapters = {**state.adapters(name)}
    if name in state.prompts:
        adapters[""] = state.prompts[name]
    steps = state.configs[name].schedule(adapters)
    if steps is not None:
        state.schedules[name] = Schedule(state, name, steps)


def _watch(schedule: Schedule) -> None:
    global _hook
    _followed.add(schedule)
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for schedule in list(_followed):
        if not schedule.by_hand and schedule.name in schedule.state.trainable and schedule.belongs_to(optimizer):
            schedule.step(_steps_of(optimizer))


def _steps_of(optimizer: torch.optim.Optimizer) -> int | None:
    """Number of steps the optimizer has taken, including those before a resume; None if it does not count them."""
    for state in optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return None
