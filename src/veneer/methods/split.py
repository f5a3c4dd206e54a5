"""Split: the first tokens of each row use one adapter, the next ones another.

    y'_t = y_t + w_i u_i,  i: the adapter whose part token t is in, u_i: what it adds to y_t

AdapterHub's `Split` (Poth et al., 2023, arXiv:2311.11077). Trainable: none, or k for each module with `learned`.
Not mergeable: it depends on the position. Not a no-op. Padding in front is not counted; tokens after the last part,
such as those that `generate` adds, belong to it. The file holds the weights and the adapters' names: load those first.
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
        places = self.target.fact("places")
        places = torch.arange(y.shape[1], device=y.device).expand(y.shape[:2]) if places is None else places
        ends = torch.tensor(self.config.splits[:-1], device=y.device).cumsum(0)
        part = torch.bucketize(places.reshape(y.shape[:-1]).contiguous(), ends, right=True)
        for w, name in zip(self.composition_weights, self.names, strict=True):
            mine = part == self.config.adapter_names.index(name)
            y = y + torch.where(mine[..., None], w * self.update(name, x, y), 0)
        return y


@dataclass(kw_only=True)
class SplitConfig(WeightedConfig):
    splits: list[int] = field(default_factory=list)
    """How many tokens belong to each adapter, in the order of `adapter_names`."""

    peft_type, adapter = Name("SPLIT"), Split
    title = "a split"
    example = {"adapter_names": ["one", "two"], "splits": [8, 8]}

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.splits) != len(self.adapter_names) or min(self.splits) < 1:
            raise ConfigError(
                f"splits must give each of the adapters {self.adapter_names} its tokens, not {self.splits}"
            )

    def fill_targets(self, model: nn.Module) -> None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise TargetError("a split counts the tokens of one sequence; this model reads two, source and target")
        super().fill_targets(model)

    def before(self, shared: nn.Module | None, facts: dict[Any, Any], model: nn.Module, kwargs: dict[str, Any]) -> None:
        super().before(shared, facts, model, kwargs)
        facts["places"] = places_of(kwargs)
