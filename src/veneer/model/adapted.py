"""`Adapted`, the type of `PeftModel.base_model`, and the attribute lookup that wrappers of a model share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..core.state import State, state_of
from ..errors import VeneerError


class Adapted(nn.Module):
    """`PeftModel.base_model`: holds the adapted model as `.model`, where PEFT's code and key names expect it."""

    prefix = "adapters."

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return _fall_through(self, name, "model")

    def enable_adapter_layers(self) -> None:
        _state(self.model).enabled = True

    def disable_adapter_layers(self) -> None:
        _state(self.model).enabled = False

    def update_and_allocate(self, global_step: int) -> None:
        """Run the adapters' schedules for `global_step`. Without any such call, the schedules run automatically."""
        for schedule in _state(self.model).schedules.values():
            schedule.by_hand = True
            schedule.step(global_step)


@contextmanager
def _flags_kept_on_error(model: nn.Module) -> Iterator[None]:
    """Restore the requires_grad flags of all parameters if the block raises."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def _state(model: nn.Module) -> State:
    """The adapter state of a model.

    Raises:
        VeneerError: the model has no adapters.
    """
    state = state_of(model)
    if state is None:
        raise VeneerError("the model has no adapters; they were merged or unloaded")
    return state


def _fall_through(module: nn.Module, name: str, inner: str) -> Any:
    """Look up an attribute in a module, then in its submodule called `inner`."""
    try:
        return nn.Module.__getattr__(module, name)
    except AttributeError:
        submodules = module.__dict__.get("_modules", {})  # missing until nn.Module.__init__ has run
        wrapped = submodules.get(inner)
        if wrapped is None or name == inner:
            raise
        return getattr(wrapped, name)
