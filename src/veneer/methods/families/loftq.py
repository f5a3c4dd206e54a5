"""LoRA with a LoftQ start: its update includes the quantisation error of the base (see `inits/loftq.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inits.loftq import LoftQConfig, loftq
from ..inits.start import check_whole
from ..lora import LoRA


class LoftQ(LoRA):
    """W' = Q + s B A, computed as W + (Q - W) + s B A.

    The base model keeps its weight W; Q - W is recomputed whenever the adapter is loaded.
    """

    @torch.no_grad()
    def initialise(self, how: bool | str) -> None:
        check_whole(self.target, "loftq")
        config = self.config.loftq_config or LoftQConfig()
        Q, A0, B0 = loftq(self.target, self.r, self.scaling, config)
        error = Q - self.target.original_weight().to(Q)
        self.register_buffer("error", error, persistent=False)
        for matrix, start in zip(self.matrices(), (A0, B0), strict=True):
            if not matrix.is_meta:
                matrix.copy_(start)

    def delta(self) -> Tensor:
        update = super().delta()
        if self.error is None:
            return update
        return update + self.error

    def term(self, x: Tensor) -> Tensor:
        update = super().term(x)
        if self.error is None:
            return update
        return update + self.target.op(x, self.error)
