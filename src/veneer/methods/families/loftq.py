"""LoftQ's adapter: a LoRA whose update also holds the error of a quantised base (see `inits/loftq.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inits.loftq import LoftQConfig, loftq
from ..inits.start import check_whole
from ..lora import LoRA


class LoftQ(LoRA):
    """W' = Q + s B A, as W + (Q - W) + s B A: the base stays whole, and Q - W is found again at each load."""

    @torch.no_grad()
    def initialise(self, how: bool | str) -> None:
        check_whole(self.target, "loftq")
        Q, A, B = loftq(self.target, self.r, self.scaling, self.config.loftq_config or LoftQConfig())
        self.register_buffer("error", Q - self.target.original_weight().to(Q), persistent=False)
        for mine, start in zip(self.matrices(), (A, B), strict=True):
            if not mine.is_meta:
                mine.copy_(start)

    def delta(self) -> Tensor:
        return super().delta() if self.error is None else super().delta() + self.error

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        y = super().post(x, y)
        return y if self.error is None else y + self.target.op(x, self.error)
