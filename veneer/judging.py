"""Is an answer right? Whole answers, extracted answers, and classes against what the data says."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from .errors import ConfigError

PADDING = re.compile(r"^[\s$€£]+|[\s.]+$")


class Extract:
    """Finds an answer in a text: the last match of a pattern.

    Args:
        pattern: a regular expression. Its first group is the answer; without a group, what follows the match on its
            line is ("####" finds the 18 of "#### 18").

    Raises:
        ConfigError: it is no regular expression.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"extract = {pattern!r} is no regular expression: {error}") from None

    def __call__(self, text: str) -> str | None:
        found = list(self.pattern.finditer(text))
        if not found:
            return None
        after = text[found[-1].end() :].partition("\n")[0]
        return (found[-1].group(1) or "" if self.pattern.groups else after).strip()


def same(answer: str | None, wanted: str) -> bool:
    """Whether two answers agree: as numbers (1,000 is 1000.0, and $18. is 18), else word by word."""
    if answer is None:
        return False
    numbers = _number(answer), _number(wanted)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return answer.split() == wanted.split()


def _number(text: str) -> Decimal | None:
    try:
        found = Decimal(PADDING.sub("", text).replace(",", ""))
    except InvalidOperation:
        return None
    return found if found.is_finite() else None


def macro_f1(predicted: list[int], wanted: list[int]) -> float:
    """The mean over classes of F1, the harmonic mean of precision and recall; classes that occur in either count."""
    scores = []
    for label in {*predicted, *wanted}:
        hits = sum(p == w == label for p, w in zip(predicted, wanted, strict=True))
        scores.append(2 * hits / (predicted.count(label) + wanted.count(label)))
    return sum(scores) / len(scores)
