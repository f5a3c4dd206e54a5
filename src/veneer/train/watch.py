"""Checks during a run that gradients reach the adapter and that it changes; otherwise the run stops with an error."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ..core import checkpoint
from ..core.sharding import whole
from ..errors import TrainingError
from ..model.guard import PATIENCE

NEGLIGIBLE = 1e-7
"""Gradients with no entry above this count as zero: next to Adam's eps, they may leave a tensor unchanged."""


class Watch(TrainerCallback):
    """Checks that gradients reach the adapter and that it changes. Create it before training starts."""

    def __init__(self, model: Any) -> None:
        self.start: dict[str, Tensor] = {}
        """Copies of the trained parameters before training, by name."""
        self.keys: dict[str, str | None] = {}
        """For each key of the adapter's file, the name of the parameter; None if it is not trained."""
        self.since: dict[str, int] = {}
        """The step at which a gradient first reached each parameter."""
        self.steps = 0
        """Steps with a learning rate above 0."""
        self.moved = False

        names: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.start[name] = _on_cpu(parameter).clone()
                names[parameter.data_ptr()] = name
        for key, tensor in checkpoint.slots(model._state, "default").items():
            self.keys[key] = names.get(tensor.data_ptr())

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        learns = any(float(group["lr"]) > 0 for group in optimizer.param_groups)
        if len(self.since) < len(self.start):
            self._look_for_gradients(model, state.global_step + 1, learns)
        self.steps += learns

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.moved:
            return
        self.moved = not self._is_unchanged(model)
        if not self.moved and self.steps >= PATIENCE:
            self._check_moved(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._check_moved(model)

    def unreached(self, step: int) -> set[str]:
        """Keys (in the adapter's file) of the tensors that no gradient had reached by the end of a step."""
        late = {name for name in self.start if self.since.get(name, step + 1) > step}
        return {key for key, name in self.keys.items() if name in late}

    def _look_for_gradients(self, model: nn.Module, step: int, learns: bool) -> None:
        """Record which parameters have a gradient; a parameter without one is an error."""
        waiting: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if name in self.start and name not in self.since:
                waiting[name] = parameter
        cut_off = [name for name, parameter in waiting.items() if parameter.grad is None]
        if cut_off:
            raise TrainingError(
                f"no gradient reaches {len(cut_off)} of {len(self.start)} trained tensors, the first is {cut_off[0]}; "
                "choose target modules that the loss depends on"
            )
        if not learns:
            return
        for name, parameter in waiting.items():
            assert parameter.grad is not None
            if parameter.numel() == 0:
                continue
            largest = float(_on_cpu(parameter.grad).abs().amax())
            if largest > NEGLIGIBLE:
                self.since[name] = step

    def _check_moved(self, model: nn.Module) -> None:
        if self._is_unchanged(model):
            raise TrainingError(
                "the adapter did not change in training; is the learning rate 0, or are all labels masked?"
            )

    def _is_unchanged(self, model: nn.Module) -> bool:
        """Whether every trained parameter has its initial value. Whole tensors are compared, so all processes agree."""
        parameters = dict(model.named_parameters())
        return all(before.equal(_on_cpu(parameters[name])) for name, before in self.start.items())


def _on_cpu(t: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded, on the CPU."""
    return whole(t).detach().cpu()
