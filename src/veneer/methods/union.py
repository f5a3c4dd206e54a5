"""Union: several methods under one name, which are trained, saved, switched and merged as one adapter.

    y' = f_k(... f_2(f_1(y))),  f_i: the i-th method

He et al., 2022, arXiv:2110.04366, show the gain of such unions; AdapterHub calls it ConfigUnion. Trainable: the sum
over its methods. Mergeable if all of them are. Each method keeps its own targets; if two adapt the same module, the
first is applied first. At most one method may be a prompt, at most one may share a module between its layers, and none
may have a schedule.
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
    """The methods: config objects, or their contents as in a file."""

    peft_type = Name("UNION")
    adapter = Parts

    def __post_init__(self) -> None:
        super().__post_init__()
        self.derived: list[Config] = []  # members that are created from the others and are not in the file
        self.configs = [Config.from_dict(c) if isinstance(c, Mapping) else c for c in self.configs]
        for config in self.configs:
            self._check_member(config)
        if not self.configs:
            raise ConfigError("configs must name the methods to unite")

    def _check_member(self, config: Any) -> None:
        if not isinstance(config, Config) or isinstance(config, UnionConfig):
            raise ConfigError(f"configs must hold the configs of single methods, not {config!r}")
        has_schedule = type(config).schedule is not Config.schedule
        if has_schedule or config.modules_to_save:
            reason = "runs on a schedule" if has_schedule else "has modules_to_save"
            raise ConfigError(f"{config.peft_type} {reason}, which a union does not support; give it a name of its own")

    def members(self) -> Sequence[Config]:
        for config in self.configs:
            config.inference_mode = self.inference_mode
        return [*self.configs, *self.derived]

    def loss(self, adapters: Sequence[Adapter]) -> Tensor | None:
        parts: list[Adapter] = []
        for adapter in adapters:
            parts.extend(adapter.parts)
        terms = []
        for config in self.configs:
            term = config.loss([part for part in parts if part.config is config])
            if term is not None:
                terms.append(term)
        return sum(terms) if terms else None

    def __copy__(self) -> UnionConfig:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.configs = list(map(copy.copy, self.configs))
        twin.derived = list(map(copy.copy, self.derived))
        return twin

    # The file

    @property
    def contents(self) -> list[dict[str, Any]]:
        """The methods' configs as they are written to the file."""
        contents = []
        for config in self.configs:
            content = config.to_dict()
            content["inference_mode"] = None  # set by the union
            for name in ALWAYS_WRITTEN:
                if content.get(name) is None:
                    content.pop(name, None)
            contents.append(content)
        return contents

    def semantic_fields(self) -> list[str]:
        return ["contents"]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "configs": self.contents}
