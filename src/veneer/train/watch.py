"""A run that learns nothing, or cannot write, ends with the reason at the first step that shows it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ..core import checkpoint
from ..core.sharding import whole
from ..errors import TrainingError
from ..model.guard import PATIENCE

NEGLIGIBLE = 1e-7
"""The largest entry of a gradient that need not move a tensor: Adam's eps is of that size."""


class Watch(TrainerCallback):
    """Looks whether gradients reach the adapter, and whether it moves. Made before training, to know the start."""

    def __init__(self, model: Any) -> None:
        learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
        places = {p.data_ptr(): name for name, p in learned.items()}
        self.start = {name: _local(p).clone() for name, p in learned.items()}
        self.keys = {k: places.get(t.data_ptr()) for k, t in checkpoint.slots(model._state, "default").items()}
        """Which parameter stands under a key of the file."""
        self.since: dict[str, int] = {}
        """The step at which a gradient first reached each tensor."""
        self.steps = 0
        self.moved = False

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        learns = any(float(group["lr"]) > 0 for group in optimizer.param_groups)
        if len(self.since) < len(self.start):
            self._look(model, state.global_step + 1, learns)
        self.steps += learns

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

    def unreached(self, step: int) -> set[str]:
        """Keys of the tensors to which no gradient had come by the end of a step."""
        late = {name for name in self.start if self.since.get(name, step + 1) > step}
        return {key for key, name in self.keys.items() if name in late}

    def _look(self, model: nn.Module, step: int, learns: bool) -> None:
        """Which gradients are there; none at all, where others are, is an error."""
        waiting = {n: p for n, p in model.named_parameters() if n in self.start and n not in self.since}
        cut_off = [name for name, p in waiting.items() if p.grad is None]
        if cut_off:
            raise TrainingError(
                f"no gradient reaches {len(cut_off)} of {len(self.start)} trained tensors, {cut_off[0]} first; give "
                "targets that take part in the loss"
            )
        for name, p in waiting.items() if learns else ():
            assert p.grad is not None
            if p.numel() and float(_local(p.grad).abs().amax()) > NEGLIGIBLE:
                self.since[name] = step

    def _still(self, model: nn.Module) -> list[str]:
        now = {name: p for name, p in model.named_parameters() if name in self.start}
        return [name for name, before in self.start.items() if before.equal(_local(now[name]))]


def _local(t: Tensor) -> Tensor:
    return whole(t).detach().cpu()
