"""Answers in a context of examples, found by the types of the tokens: multiples of 4 are answers, 0 is padding."""

import torch
from torch import Tensor


def is_answer(types: Tensor) -> Tensor:
    """Whether each token belongs to an answer."""
    return (types > 0) & (types % 4 == 0)


def decay(types: Tensor, factor: float) -> Tensor:
    """The weight of each position (batch, length): `factor` to the power of the number of answers after its own."""
    numbers = torch.where(is_answer(types), types // 4, 0)
    absent = torch.zeros(len(types), int(numbers.max()) + 1, device=types.device)
    present = absent.scatter(1, numbers, 1.0)
    from_here = present.flip(1).cumsum(1).flip(1)
    later = from_here - present
    return factor ** later.gather(1, numbers)
