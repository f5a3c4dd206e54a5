"""SimPO, simple preference optimization without a reference (Meng et al., 2024, arXiv:2405.14734, eq. 6).

    loss = -logsigmoid(beta / n_chosen log p(chosen) - beta / n_rejected log p(rejected) - gamma)

where n is the number of an answer's tokens.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import Answers, Objective


class SimPO(Objective):
    """Simple preference optimization."""

    has_reference: ClassVar[bool] = False

    beta: float = Field(2.0, gt=0)
    """The weight of the mean log-probabilities."""
    gamma: float = Field(1.0, ge=0)
    """The margin that the chosen answer must have."""

    def losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        return -logsigmoid(self.reward(chosen) - self.reward(rejected) - self.gamma)

    def reward(self, answers: Answers) -> Tensor:
        return self.beta * answers.mean
