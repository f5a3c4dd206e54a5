"""Matching regular expressions from configs in bounded time, because a config may have an unknown author.

Python's `re` can take practically forever to match forty characters. `regex` reads the same expressions and has a time
limit.
"""

from __future__ import annotations

import math
import re
import time
from functools import lru_cache
from typing import Any

from ..errors import ConfigError

SECONDS = 1.0
"""The time that all matches of an expression may take together. An ordinary match takes microseconds."""
UNNOTICED = 1e-3
"""Matches that take at most this many seconds are not counted."""
MOST_CHARACTERS = 20_000
MOST_REPEATS = 10_000
"""The largest accepted product of the repeat counts in an expression: `regex` expands nested repeats."""


class Pattern:
    """A regular expression, and the time in seconds that its matches may still take."""

    def __init__(self, text: str, field: str) -> None:
        import regex

        self.field, self.left = field, SECONDS
        self.shown = text if len(text) <= 100 else f"{text[:100]}..."
        self._check_size(text)
        try:
            re.compile(text)
            self.compiled = regex.compile(text)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{field} = {self.shown!r} is not a regular expression: {error}") from None

    def _check_size(self, text: str) -> None:
        repeats = math.prod(max(1, int(n[:9])) for n in re.findall(r"\{\s*(?:\d*\s*,\s*)?(\d+)\s*\}", text))
        if len(text) > MOST_CHARACTERS or repeats > MOST_REPEATS:
            raise ConfigError(
                f"{self.field} = {self.shown!r} is too large for a regular expression: it has {len(text)} characters, "
                f"and its repeats multiply to {repeats}; at most {MOST_CHARACTERS} and {MOST_REPEATS} are accepted"
            )

    def match(self, text: str, whole: bool = False) -> Any:
        """Match the start of `text`, or all of it if `whole` is true; None if it does not match.

        CPU time is counted, because on a busy machine a match may wait long before it runs.

        Raises:
            ConfigError: the matches of the expression have taken too long.
        """
        find = self.compiled.fullmatch if whole else self.compiled.match
        while True:
            start = time.thread_time()
            try:
                match = find(text, timeout=max(self.left, UNNOTICED))
                is_complete = True
            except TimeoutError:
                is_complete = False
            taken = time.thread_time() - start
            if taken > UNNOTICED:
                self.left -= taken
            if self.left <= 0:
                raise ConfigError(
                    f"{self.field} = {self.shown!r} takes too long to match (more than {SECONDS:g} s in total); "
                    "write it without nested or repeated wildcards"
                )
            if is_complete:
                return match


@lru_cache(maxsize=4096)
def pattern(text: str, field: str) -> Pattern:
    """Compile the regular expression in a config field.

    Raises:
        ConfigError: it is not a regular expression, or is too large.
    """
    return Pattern(text, field)


def fits(text: str, path: str, field: str) -> bool:
    """Whether the expression in a config field matches a whole path."""
    return pattern(text, field).match(path, whole=True) is not None
