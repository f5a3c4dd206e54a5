"""Choosing the next token of one sequence, independently of the other rows of the batch."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen."""

    temperature: float = 1.0
    """0 always takes the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """Sample from this many of the most likely tokens; 0: from all."""
    seed: int | None = None
    """None: another one each time."""
    logprobs: int | None = None
    """How many of the most likely tokens to list with each token; None: no log-probabilities at all."""


@dataclass(frozen=True)
class Token:
    """A generated token."""

    id: int
    logprob: float | None = None
    """Its log-probability before temperature, top_k and top_p."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and their log-probabilities."""


class Sampler:
    """Draws the tokens of one answer: with the same seed, those that `generate` draws after `torch.manual_seed`."""

    def __init__(self, sampling: Sampling, device: Any = "cpu") -> None:
        self.sampling = sampling
        self.is_greedy = sampling.temperature == 0
        self.generator = torch.Generator(device)
        self.generator.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
        self.warpers = [] if self.is_greedy else _warpers(sampling)

    def choose(self, logits: Tensor, likeliest: int) -> Token:
        """The next token for logits (vocabulary,) in fp32, whose largest is at `likeliest`."""
        chosen = likeliest if self.is_greedy else self._draw(logits[None])
        if self.sampling.logprobs is None:
            return Token(chosen)
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(self.sampling.logprobs, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(chosen, float(logprobs[chosen]), top)

    def _draw(self, scores: Tensor) -> int:
        ids = torch.empty(1, 0, dtype=torch.long, device=scores.device)
        for warper in self.warpers:
            scores = warper(ids, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))


def _warpers(sampling: Sampling) -> list[Any]:
    """transformers' own, in the order of `generate`."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = []
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers
