"""The sizes of VB-LoRA's files, as PEFT's tuner states them."""

from __future__ import annotations

from typing import Any

from ..core import checkpoint


class WithSizes:
    """Methods of VB-LoRA's tuner only."""

    def get_nb_savable_parameters(self: Any, adapter: str = "default") -> tuple[int, int]:
        """(size of an adapter's file in numbers of float32, other trainable parameters)."""
        saved = checkpoint.slots(self.state, adapter).values()
        size = sum(tensor.numel() * tensor.element_size() for tensor in saved)
        own = {id(parameter) for parameter in self.state.parameters(adapter)}
        others = 0
        for parameter in self.parameters():
            if parameter.requires_grad and id(parameter) not in own:
                others += parameter.numel()
        return size // 4, others

    def print_savable_parameters(self) -> None:
        size, others = self.get_nb_savable_parameters()
        print(
            f"VB-LoRA params to-be-saved (float32-equivalent): {size:,d} "
            f"|| total params to-be-saved: {size + others:,d}"
        )
