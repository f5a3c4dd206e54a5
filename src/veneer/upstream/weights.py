"""transformers' own conversion of checkpoints to and from the parameters of a model (`core_model_loading`).

A mixture of experts, for one, has a tensor for each expert in its files and one parameter for all in memory. The names
are the same in 5.20 to 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Conversions:
    """What is done to the tensors of a model's files when they are loaded."""

    transforms: list[Any]
    renamings: list[Any]
    converters: list[Any]

    def rename(self, key: str, prefix: str, names: dict[str, Tensor]) -> tuple[str, str | None]:
        """(the model's name of a file's key, the pattern of the converter that takes it or None).

        Args:
            prefix: the model's `base_model_prefix`.
            names: the model's state dict.
        """
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(key, self.renamings, self.converters, prefix, names)

    def used(self) -> list[Any]:
        """The transforms that took part in a renaming so far, which `revert` undoes."""
        return [transform for transform in self.transforms if transform.was_used()]


def conversions(model: Any) -> Conversions:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    return Conversions(transforms, renamings, converters)


def remember(model: Any, transforms: list[Any]) -> None:
    """Note on a model which transforms its files went through, as transformers does in loading."""
    model._weight_conversions = transforms


def revert(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a model as its files have them."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(tensors))


def order_of(key: str) -> Any:
    """A sort key that puts numbered parts of names in the order of their numbers."""
    from transformers.core_model_loading import dot_natural_key

    return dot_natural_key(key)
