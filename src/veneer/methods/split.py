"""Split: apply different adapters to consecutive parts of each sequence.

    y'_t = y_t + w_i u_i,  i: the adapter of the part that token t is in, u_i: what it adds to y_t

AdapterHub's `Split` (Poth et al., 2023, arXiv:2311.11077). Trainable: none, or k for each module with `learned`. Not
mergeable: the update depends on the position. Does not start as a no-op. Left padding is not counted; tokens after the
last part, such as those that `generate` adds, belong to the last part. The file holds the weights and the names of the
adapters, which must be loaded first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import Name
from ..errors import ConfigError, TargetError
from ..upstream.positions import places_of
from .families.compositions import Weighted, WeightedConfig


class Split(Weighted):
    kinds = frozenset({"linear", "embedding", "norm", "block"})

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        part = self.part_of_tokens(y)
        for w, name in zip(self.composition_weights, self.names, strict=True):
            in_part = part == self.config.adapter_names.index(name)
            update = w * self.update(name, x, y)
            y = y + torch.where(in_part[..., None], update, 0)
        return y

    def part_of_tokens(self, y: Tensor) -> Tensor:
        """The index of the part that each token of y (batch, length, width) is in, (batch, length)."""
        positions = self.target.fact("places")
        if positions is None:
            index = torch.arange(y.shape[1], device=y.device)
            positions = index.expand(y.shape[:2])
        positions = positions.reshape(y.shape[:-1]).contiguous()
        ends = torch.tensor(self.config.splits[:-1], device=y.device).cumsum(0)
        return torch.bucketize(positions, ends, right=True)


@dataclass(kw_only=True)
class SplitConfig(WeightedConfig):
    splits: list[int] = field(default_factory=list)
    """Number of tokens for each adapter, in the order of `adapter_names`."""

    peft_type = Name("SPLIT")
    adapter = Split
    title = "a split"
    example = {"adapter_names": ["one", "two"], "splits": [8, 8]}

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.splits) != len(self.adapter_names) or min(self.splits) < 1:
            raise ConfigError(
                f"splits must give each of the adapters {self.adapter_names} a number of tokens, not {self.splits}"
            )

    def fill_targets(self, model: nn.Module) -> None:
        model_config = getattr(model, "config", None)
        if getattr(model_config, "is_encoder_decoder", False):
            raise TargetError("a split counts the tokens of one sequence; this model reads two, source and target")
        super().fill_targets(model)

    def before(self, shared: nn.Module | None, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        super().before(shared, facts, model, kwargs)
        facts["places"] = places_of(kwargs)
