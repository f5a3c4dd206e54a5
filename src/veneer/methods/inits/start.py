"""LoRA's initialisations by name, including starts that are subtracted so that the base model stays unchanged.

With a start A0, B0 the adapter is W' = W + s (B A - B0 A0): a no-op at first, which learns along the directions of A0
and B0. If A0 and B0 are computed from W, they are recomputed when the adapter is loaded. If they are computed from
data, the file is that of a plain LoRA of twice the rank, [A; A0] and [B, -B0].
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
"""Starts that cannot be recomputed when the adapter is loaded."""
SETTINGS = {"eva": EvaConfig, "corda": CordaConfig, "lora_ga": LoraGAConfig, "loftq": LoftQConfig}


@dataclass(kw_only=True)
class StartConfig(LayerConfig):
    """The config fields of a method that has LoRA's initialisations."""

    init_lora_weights: bool | str = True
    """True: the paper's start. False: B is random too. "gaussian": A is normal. "orthogonal": A and B are random, and
    B A is zero. Computed from the weight: "pissa", "pissa_niter_N", "olora", "mica", "loftq". Computed from data, which
    must first be run through the model: "eva", "corda", "lora_ga"."""
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
        """Raise ConfigError for settings of an initialisation that is not selected. PEFT's files may contain them."""
        if self.from_file:
            return
        for name in SETTINGS:
            if name != self.init_lora_weights and getattr(self, f"{name}_config") is not None:
                raise ConfigError(f"{name}_config has no effect without init_lora_weights={name!r}")

    def check_start(self, lora: Any) -> None:
        """Raise ConfigError if the adapter's file cannot hold its start."""
        if self.init_lora_weights in FROM_DATA and len(list(lora.state_dict())) > 2:
            check_joined(lora)

    def saved(self) -> Config:
        if self.init_lora_weights in FROM_DATA:
            return plain(self)
        return copy.copy(self)

    def to_dict(self) -> dict[str, Any]:
        content = super().to_dict()
        for name in SETTINGS:
            field = f"{name}_config"
            if getattr(self, field) is None:
                content.pop(field, None)
        return content


class Started(LowRank):
    """A pair of factors A and B with a selectable start."""

    r: int
    scaling: float
    holds_A: bool = False
    """Whether A is kept fixed (LoRA-FA)."""

    def __init__(self, config: StartConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The trained A (r, in) and B (out, r), without the scaling."""
        raise NotImplementedError

    @torch.no_grad()
    def initialise(self, how: bool | str) -> None:
        """Set A and B to the start that `init_lora_weights` names."""
        A, B = self.matrices()
        start = start_of(self.target, self.r, self.scaling, self.config)
        if start is not None:
            self.start_from(*start)
        elif A.is_meta:
            return
        elif how == "orthogonal":
            random_A, random_B = orthogonal(self.r, A.shape[1], B.shape[0])
            A.copy_(random_A)
            B.copy_(random_B)
        elif self.target.kind == "embedding":
            start_embedding_(A, B, how)
        else:
            start_linear_(A, B, how, self.r)

    def start_from(self, A0: Tensor, B0: Tensor) -> None:
        """Start at A0, B0 and subtract their product: a no-op that learns along their directions."""
        self.start_A = A0
        self.start_B = B0
        for matrix, start in zip(self.matrices(), (A0, B0), strict=True):
            if not matrix.is_meta:
                matrix.copy_(start)

    def learned(self) -> list[nn.Parameter]:
        if not self.holds_A:
            return super().learned()
        frozen = ("lora_A", "lora_embedding_A")
        return [parameter for name, parameter in self.named_parameters() if not name.startswith(frozen)]

    def export(self) -> Tensors:
        tensors = super().export()
        if self.config.init_lora_weights in FROM_DATA:
            return joined(self, tensors)
        return tensors

    def absorb(self, tensors: Tensors) -> None:
        if self.config.init_lora_weights in FROM_DATA:
            tensors = parted(self, tensors)
        super().absorb(tensors)


def start_embedding_(A: Tensor, B: Tensor, how: bool | str) -> None:
    """A zero and B normal; both normal if `how` is False."""
    if how is False:
        A.normal_()
    else:
        A.zero_()
    B.normal_()


def start_linear_(A: Tensor, B: Tensor, how: bool | str, r: int) -> None:
    """A random and B zero; both random if `how` is False."""
    if how == "gaussian":
        A.normal_(std=1 / r)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if how is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    else:
        B.zero_()


def check_whole(target: Target, how: str) -> None:
    """Raise TargetError unless the target's weight is a single matrix."""
    if target.groups > 1:
        parts = f"{target.groups} groups of channels"
    elif target.copies > 1:
        parts = f"{target.copies} matrices"
    else:
        return
    raise TargetError(f"{target.path!r} has {parts}; init_lora_weights {how!r} is for a single matrix")


def start_of(target: Target, r: int, scaling: float, config: Any) -> tuple[Tensor, Tensor] | None:
    """A0 (r, in) and B0 (out, r), to start at and to subtract; None if the start is not subtracted.

    Raises:
        ConfigError: the rank is too large, or the data that the start needs is missing.
        TargetError: the target's weight is not a single matrix.
    """
    how = config.init_lora_weights
    if not isinstance(how, str):
        return None
    if how not in ("gaussian", "eva"):
        check_whole(target, how)
    if how == "corda":
        return corda_start(target, r, scaling, config)
    if how == "lora_ga":
        return lora_ga_start(target, r, scaling, config)
    if how == "olora":
        return olora(target.original_weight(), r)
    if how.startswith("pissa"):
        return pissa(target.original_weight(), r, scaling, how)
    return None
