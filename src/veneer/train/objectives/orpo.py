"""ORPO, odds-ratio preference optimization: both answers in one stage (Hong et al., 2024, arXiv:2403.07691, eq. 6).

loss = -log P(chosen) - beta logsigmoid(log odds(chosen) - log odds(rejected))
odds = P / (1 - P),  log P = mean log-probability of the answer's tokens
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import Answers, Objective


class ORPO(Objective):
    """Odds-ratio preference optimization. It replaces supervised training, so it has the same learning rate."""

    has_reference: ClassVar[bool] = False
    rate: ClassVar[float] = 1.0

    beta: float = Field(0.1, ge=0)
    """The weight of the odds ratio (the paper's lambda)."""

    def losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        ratio = _log_odds(chosen.mean) - _log_odds(rejected.mean)
        return -chosen.mean - self.beta * logsigmoid(ratio)

    def reward(self, answers: Answers) -> Tensor:
        return answers.mean


def _log_odds(log_p: Tensor) -> Tensor:
    """log(P / (1 - P)) for log P; finite also where P rounds to 1."""
    log_p = log_p.clamp_max(-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))
