"""Sizes that a file's config asks for are looked at before memory is taken: the config may ask for anything."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from ..errors import CheckpointError

LEAST = 1 << 26
"""Bytes that any adapter may take for one tensor, however small its base model."""


class Bounded(TorchFunctionMode):
    """Inside, no tensor larger than the base model is made: no adapter needs one. Those without memory (meta) pass.

    Raises:
        CheckpointError: one was asked for; nothing was allocated.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.makers = _device_constructors()

    @cached_property
    def most(self) -> int:
        """Bytes of the base model, which are counted when something large is asked for."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.makers and func is not torch.tensor and func is not torch.as_tensor:
            self._check(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "overflow" in str(error):
                raise CheckpointError(
                    f"the config asks for a tensor of a size that there is none of: {error}"
                ) from None
            raise

    def _check(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        settings = {name: value for name, value in kwargs.items() if name not in ("generator", "pin_memory", "out")}
        try:
            size = func(*args, **settings | {"device": "meta"}).nbytes
        except (RuntimeError, OverflowError) as error:
            raise CheckpointError(f"the config asks for a tensor that no memory can hold: {error}") from None
        is_free = kwargs.get("device") is None or torch.device(kwargs["device"]).type == "meta"
        if size > LEAST and size > self.most and not is_free:
            raise CheckpointError(
                f"the config asks for a tensor of {size:,} bytes, more than its base model has ({self.most:,}); "
                "look at its ranks and sizes"
            )
