"""What all objectives have in common: settings, a loss for each pair, and the reward that it implies for an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...data.sources import Strict


@dataclass(frozen=True)
class Answers:
    """One answer to each of n prompts, as the model sees it. Each tensor is (n,)."""

    log_p: Tensor
    """The sum of the log-probabilities of the answer's tokens, after its prompt."""
    reference: Tensor | None
    """The same without the adapter; None if the objective has no reference."""
    tokens: Tensor
    """The number of the answer's tokens."""

    @property
    def mean(self) -> Tensor:
        """The mean log-probability of a token."""
        return self.log_p / self.tokens

    @property
    def gain(self) -> Tensor:
        """How much more likely the answer is with the adapter: log p - log p_reference."""
        assert self.reference is not None, "the objective has a reference"
        return self.log_p - self.reference


class Objective(Strict):
    """An objective over pairs of a chosen and a rejected answer. The fields are its settings."""

    has_reference: ClassVar[bool]
    """Whether answers are compared with those of the model without the adapter."""
    rate: ClassVar[float] = 0.1
    """The learning rate, as a share of the one that is recommended for the method."""

    def losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        """The loss of each pair, (n,)."""
        raise NotImplementedError

    def reward(self, answers: Answers) -> Tensor:
        """The reward that the objective gives each answer, (n,)."""
        raise NotImplementedError
