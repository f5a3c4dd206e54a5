"""Answers in a context of examples, by the type of each token: a multiple of 4 is an answer, 0 is padding."""

import torch
from torch import Tensor


def is_answer(types: Tensor) -> Tensor:
    return (types > 0) & (types % 4 == 0)


def decay(types: Tensor, factor: float) -> Tensor:
    """The weight of each position of (batch, length): factor to the number of answers that come after its own."""
    answer = torch.where(is_answer(types), types // 4, 0)
    present = torch.zeros(len(types), int(answer.max()) + 1, device=types.device).scatter(1, answer, 1.0)
    later = present.flip(1).cumsum(1).flip(1) - present
    return factor ** later.gather(1, answer)
