"""A limit on the tensors that a config from a file may allocate, checked before any memory is used."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from ..errors import CheckpointError

LEAST = 1 << 26
"""The size in bytes up to which a tensor is always allowed, however small the base model is."""


class Bounded(TorchFunctionMode):
    """A context in which no tensor larger than the base model can be created, because no adapter needs one.

    Placeholder tensors on the meta device are not limited.

    Raises:
        CheckpointError: a larger tensor was requested; nothing was allocated.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.makers = _device_constructors()

    @cached_property
    def most(self) -> int:
        """The size of the base model in bytes, counted when a large tensor is first requested."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.makers and func is not torch.tensor and func is not torch.as_tensor:
            self._check(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "overflow" in str(error):
                raise CheckpointError(f"the config asks for an impossibly large tensor: {error}") from None
            raise

    def _check(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Raise CheckpointError if the tensor is too large; a placeholder on the meta device gives its size."""
        settings = dict(kwargs, device="meta")
        for name in ("generator", "pin_memory", "out"):
            settings.pop(name, None)
        try:
            size = func(*args, **settings).nbytes
        except (RuntimeError, OverflowError) as error:
            raise CheckpointError(f"the config asks for a tensor that no memory can hold: {error}") from None
        device = kwargs.get("device")
        takes_memory = device is not None and torch.device(device).type != "meta"
        if takes_memory and size > LEAST and size > self.most:
            raise CheckpointError(
                f"the config asks for a tensor of {size:,} bytes, more than its base model has ({self.most:,}); "
                "check the ranks and sizes in the config"
            )
