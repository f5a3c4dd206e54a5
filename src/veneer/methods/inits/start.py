"""Where a LoRA starts: the initialisers by name, and the starts that are taken off again so that the base stays whole.

With a start A0, B0 the adapter is W' = W + s (B A - B0 A0): a no-op that learns along the directions of A0 and B0.
Where A0, B0 follow from W, they are found again at load; where they came from data, the file is that of a plain LoRA
of twice the rank, [A; A0] and [B, -B0].
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import LowRank, Tensors
from ...core.config import Config, LayerConfig
from ...errors import ConfigError, TargetError
from ...targets.target import Target
from .corda import CordaConfig, corda_start
from .eva import EvaConfig
from .loftq import LoftQConfig
from .lora_ga import LoraGAConfig, lora_ga_start
from .olora import olora
from .orthogonal import orthogonal
from .pissa import pissa
from .plain import check_joined, joined, parted, plain

NAMES = "gaussian|orthogonal|olora|eva|corda|lora_ga|loftq|pissa|mica"
FROM_DATA = ("corda", "lora_ga")
"""Starts that cannot be found again at load."""
SETTINGS = {"eva": EvaConfig, "corda": CordaConfig, "lora_ga": LoraGAConfig, "loftq": LoftQConfig}


@dataclass(kw_only=True)
class StartConfig(LayerConfig):
    """Fields of a method that starts as LoRA does."""

    init_lora_weights: bool | str = True
    """True: the paper's. False: B random too. "gaussian": A normal. Else where in the weight, or in data, to start:
    "pissa", "pissa_niter_N", "olora", "orthogonal", "loftq"; "eva", "corda", "lora_ga", which look at data first."""
    eva_config: EvaConfig | None = None
    """Settings of "eva"."""
    corda_config: CordaConfig | None = None
    """Settings of "corda"."""
    lora_ga_config: LoraGAConfig | None = None
    """Settings of "lora_ga"."""
    loftq_config: LoftQConfig | None = None
    """Settings of "loftq"."""

    def __post_init__(self) -> None:
        self.loftq_config = self.loftq_config or None  # PEFT writes {}
        super().__post_init__()
        how = str(self.init_lora_weights)
        if how.lower() == "olora":
            self.init_lora_weights = how = "olora"
        if not re.fullmatch(rf"True|False|{NAMES}|pissa_niter_\d+", how):
            names = NAMES.replace("|", ", ")
            raise ConfigError(f"init_lora_weights {how!r}: use True, False, {names} or pissa_niter_N")
        if how in SETTINGS and getattr(self, f"{how}_config") is None:
            setattr(self, f"{how}_config", SETTINGS[how]())

    def check_settings(self) -> None:
        """Raise ConfigError for settings of an initialiser other than the one named. PEFT's files may hold some."""
        for name in () if self.from_file else SETTINGS:
            if name != self.init_lora_weights and getattr(self, f"{name}_config") is not None:
                raise ConfigError(f"{name}_config has no effect without init_lora_weights={name!r}")

    def check_start(self, lora: Any) -> None:
        """Raise ConfigError for an adapter whose file could not hold its start."""
        if self.init_lora_weights in FROM_DATA and len(list(lora.state_dict())) > 2:
            check_joined(lora)

    def saved(self) -> Config:
        return plain(self) if self.init_lora_weights in FROM_DATA else copy.copy(self)

    def to_dict(self) -> dict[str, Any]:
        unused = [f"{name}_config" for name in SETTINGS if getattr(self, f"{name}_config") is None]
        return {key: value for key, value in super().to_dict().items() if key not in unused}


class Started(LowRank):
    """A pair A, B with a start."""

    r: int
    scaling: float
    holds_A: bool = False
    """A stays as it is in training (LoRA-FA)."""

    def __init__(self, config: StartConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The trained A (r, in) and B (out, r), without the scaling."""
        raise NotImplementedError

    @torch.no_grad()
    def initialise(self, how: bool | str) -> None:
        A, B = self.matrices()
        start = start_of(self.target, self.r, self.scaling, self.config)
        if start is not None:
            self.start_from(*start)
        elif A.is_meta:
            return
        elif how == "orthogonal":
            for mine, random in zip((A, B), orthogonal(self.r, A.shape[1], B.shape[0]), strict=True):
                mine.copy_(random)
        elif self.target.kind == "embedding":
            (A.zero_() if how is not False else A.normal_(), B.normal_())
        else:
            A.normal_(std=1 / self.r) if how == "gaussian" else nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.kaiming_uniform_(B, a=math.sqrt(5)) if how is False else B.zero_()

    def start_from(self, A0: Tensor, B0: Tensor) -> None:
        """Start at A0, B0 and subtract them: a no-op that learns along their directions."""
        self.start_A, self.start_B = A0, B0
        for mine, theirs in zip(self.matrices(), (A0, B0), strict=True):
            if not mine.is_meta:
                mine.copy_(theirs)

    def learned(self) -> list[nn.Parameter]:
        if not self.holds_A:
            return super().learned()
        return [p for name, p in self.named_parameters() if not name.startswith(("lora_A", "lora_embedding_A"))]

    def export(self) -> Tensors:
        tensors = super().export()
        return joined(self, tensors) if self.config.init_lora_weights in FROM_DATA else tensors

    def absorb(self, tensors: Tensors) -> None:
        super().absorb(parted(self, tensors) if self.config.init_lora_weights in FROM_DATA else tensors)


def check_whole(target: Target, how: str) -> None:
    """Raise TargetError unless the update is one product B A."""
    if target.groups > 1 or target.copies > 1:
        what = f"{target.groups} groups of channels" if target.groups > 1 else f"{target.copies} matrices"
        raise TargetError(f"{target.path!r} has {what}; init_lora_weights {how!r} is for a single matrix")


def start_of(target: Target, r: int, scaling: float, config: Any) -> tuple[Tensor, Tensor] | None:
    """A0 (r, in) and B0 (out, r) to start at and take off again; None where nothing need be taken off.

    Raises:
        ConfigError: the rank is too large, or what the start is made from is missing.
        TargetError: the target's weight is not one matrix.
    """
    how = config.init_lora_weights
    if isinstance(how, str) and how not in ("gaussian", "eva"):
        check_whole(target, how)
    if not isinstance(how, str) or not how.startswith(("pissa", "olora", *FROM_DATA)):
        return None
    if how in FROM_DATA:
        return {"corda": corda_start, "lora_ga": lora_ga_start}[how](target, r, scaling, config)
    W = target.original_weight()
    return olora(W, r) if how == "olora" else pissa(W, r, scaling, how)
