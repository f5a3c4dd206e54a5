"""A run that learns nothing ends at the first step that shows it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ..errors import TrainingError, listing

PATIENCE = 10
"""Optimizer steps with a learning rate above 0 after which an adapter must have moved."""


class Watch(TrainerCallback):
    """Looks whether gradients reach the adapter, and whether it moves. Made before training, to know the start."""

    def __init__(self, model: nn.Module) -> None:
        self.start = {name: _whole(p).clone() for name, p in model.named_parameters() if p.requires_grad}
        self.steps = 0
        self.reached = self.moved = False

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if not self.reached:
            self._check_reached(model)
        self.reached = True
        self.steps += any(float(group["lr"]) > 0 for group in optimizer.param_groups)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.moved:
            self.moved = len(self._still(model)) < len(self.start)
        if not self.moved and self.steps >= PATIENCE:
            self._check_moved(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._check_moved(model)

    def _check_moved(self, model: nn.Module) -> None:
        if len(self._still(model)) == len(self.start):
            raise TrainingError("the adapter did not change in training; is the learning rate 0, or no label reached?")

    def _check_reached(self, model: nn.Module) -> None:
        cut_off = [name for name, p in model.named_parameters() if name in self.start and p.grad is None]
        if cut_off:
            raise TrainingError(
                f"no gradient reaches {len(cut_off)} of {len(self.start)} trained tensors; name targets that take part "
                f"in the loss:{listing(cut_off)}"
            )

    def _still(self, model: nn.Module) -> list[str]:
        now = {name: p for name, p in model.named_parameters() if name in self.start}
        return [name for name, before in self.start.items() if before.equal(_whole(now[name]))]


def _whole(parameter: Tensor) -> Tensor:
    parameter = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return parameter.detach().cpu()
