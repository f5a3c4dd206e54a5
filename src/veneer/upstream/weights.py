"""transformers' conversion between the tensors in checkpoint files and a model's parameters (`core_model_loading`).

For example, a mixture of experts has one tensor per expert in its files, but one parameter for all of them in memory.
The names used here are the same in 5.20 to 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Conversions:
    """The conversions that the tensors in a model's files go through when they are loaded."""

    transforms: list[Any]
    renamings: list[Any]
    converters: list[Any]

    def rename(self, key: str, prefix: str, names: dict[str, Tensor]) -> tuple[str, str | None]:
        """(parameter name for a key in a file, pattern of the converter for it or None).

        Args:
            prefix: the model's `base_model_prefix`.
            names: the model's state dict.
        """
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(key, self.renamings, self.converters, prefix, names)

    def used(self) -> list[Any]:
        """The conversions that took part in a renaming so far, which `revert` undoes."""
        return [transform for transform in self.transforms if transform.was_used()]


def conversions(model: Any) -> Conversions:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    return Conversions(transforms, renamings, converters)


def remember(model: Any, transforms: list[Any]) -> None:
    """Store on a model which conversions its files went through, as transformers does when it loads a model."""
    model._weight_conversions = transforms


def revert(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a model's parameters to the tensors that its files hold, by key."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(tensors))


def order_of(key: str) -> Any:
    """A sort key by which the numbers in names are in numerical order."""
    from transformers.core_model_loading import dot_natural_key

    return dot_natural_key(key)
