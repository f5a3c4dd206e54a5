"""A union of methods under one name: they are trained, saved, switched and merged as one adapter.

    y' = what the last method makes of what those before it make of y

He et al., 2022, arXiv:2110.04366, shows that such unions gain; AdapterHub calls it ConfigUnion. Trainable: the sum.
Mergeable if all are. Each method keeps its own targets; where two adapt a module, the first is the innermost. At most
one may be a prompt, at most one may share a module between its layers, and none may run on a schedule.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core.adapter import Adapter, Parts
from ..core.config import ALWAYS_WRITTEN, Config, Name
from ..errors import ConfigError


@dataclass(kw_only=True)
class UnionConfig(Config):
    configs: list[Any] = field(default_factory=list)
    """The methods: configs, or their content as a file has it."""

    peft_type, adapter = Name("UNION"), Parts

    def __post_init__(self) -> None:
        super().__post_init__()
        self.derived: list[Config] = []  # members that follow from the others and are in no file
        self.configs = [Config.from_dict(c) if isinstance(c, Mapping) else c for c in self.configs]
        for config in self.configs:
            if not isinstance(config, Config) or isinstance(config, UnionConfig):
                raise ConfigError(f"configs must hold the configs of single methods, not {config!r}")
            if type(config).schedule is not Config.schedule or config.modules_to_save:
                what = "runs on a schedule" if type(config).schedule is not Config.schedule else "has modules_to_save"
                raise ConfigError(f"{config.peft_type} {what}, which a union cannot; give it a name of its own")
        if not self.configs:
            raise ConfigError("configs must name the methods to unite")

    def members(self) -> Sequence[Config]:
        for config in self.configs:
            config.inference_mode = self.inference_mode
        return [*self.configs, *self.derived]

    def loss(self, adapters: Sequence[Adapter]) -> Tensor | None:
        parts = [part for adapter in adapters for part in adapter.parts]
        terms = [config.loss([part for part in parts if part.config is config]) for config in self.configs]
        return sum(found) if (found := [term for term in terms if term is not None]) else None

    def __copy__(self) -> UnionConfig:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.configs, twin.derived = (list(map(copy.copy, configs)) for configs in (self.configs, self.derived))
        return twin

    # The file

    @property
    def contents(self) -> list[dict[str, Any]]:
        """What of the methods goes to the file."""
        contents = [{**config.to_dict(), "inference_mode": None} for config in self.configs]
        return [{k: v for k, v in c.items() if v is not None or k not in ALWAYS_WRITTEN} for c in contents]

    def semantic_fields(self) -> list[str]:
        return ["contents"]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "configs": self.contents}
