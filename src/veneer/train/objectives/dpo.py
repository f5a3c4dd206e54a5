"""DPO, direct preference optimization (Rafailov et al., 2023, arXiv:2305.18290, eq. 7).

    loss = -logsigmoid(z),  z = beta (g_chosen - g_rejected),  g = log p(answer) - log p_reference(answer)

The reference is the model without the adapter. Variants:

    label smoothing e    -(1 - e) logsigmoid(z) - e logsigmoid(-z)                         (cDPO, Mitchell 2023)
    hinge                max(0, 1 - z)                                                     (SLiC, arXiv:2305.10425)
    ipo                  (g_chosen / n_chosen - g_rejected / n_rejected - 1 / (2 beta))^2  (arXiv:2310.12036, eq. 17)

where n is the number of an answer's tokens; with sums in place of these means, IPO's loss would grow with the length.
`sft_weight` adds the mean loss of the chosen answer's tokens (RPO, arXiv:2404.19733, eq. 1), which keeps the chosen
answers from becoming less likely together with the rejected ones.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import Answers, Objective


class DPO(Objective):
    """Direct preference optimization."""

    has_reference: ClassVar[bool] = True

    beta: float = Field(0.1, gt=0)
    """How strongly the model is kept at the reference."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The function of the difference."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The share of pairs that are assumed to be labelled the wrong way round; with the loss sigmoid only."""
    sft_weight: float = Field(0.0, ge=0)
    """The weight of the chosen answer's own loss."""

    def losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        losses = self._difference(chosen, rejected)
        if self.sft_weight:
            losses = losses - self.sft_weight * chosen.mean
        return losses

    def _difference(self, chosen: Answers, rejected: Answers) -> Tensor:
        if self.loss == "ipo":
            difference = chosen.gain / chosen.tokens - rejected.gain / rejected.tokens
            return (difference - 1 / (2 * self.beta)).square()
        z = self.beta * (chosen.gain - rejected.gain)
        if self.loss == "hinge":
            return (1 - z).relu()
        e = self.label_smoothing
        return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z)

    def reward(self, answers: Answers) -> Tensor:
        return self.beta * answers.gain
