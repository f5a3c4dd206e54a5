"""Regular expressions from configs, matched in bounded time: a file that anybody may have written brings them.

Python's `re` can take longer than the universe lasts over forty characters; `regex` reads the same expressions and
can be given a time limit.
"""

from __future__ import annotations

import math
import re
import time
from functools import lru_cache
from typing import Any

from ..errors import ConfigError

SECONDS = 1.0
"""What all matches of one expression may take together; the matches of an honest one take microseconds each."""
UNNOTICED = 1e-3
"""A match as quick as this is not counted."""
MOST_CHARACTERS = 20_000
MOST_REPEATS = 10_000
"""Product of an expression's repeat counts: nested ones are written out when it is compiled."""


class Pattern:
    """An expression, and the time that it may still take."""

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
                f"{self.field} = {self.shown!r} is too large for a regular expression: {len(text)} characters, its "
                f"repeats written out {repeats} times; at most {MOST_CHARACTERS} and {MOST_REPEATS} are taken"
            )

    def match(self, text: str, whole: bool = False) -> Any:
        """A match at the start of `text`, or of all of it; None where there is none.

        Time is counted on the processor: on a busy machine a match may wait long before it runs.

        Raises:
            ConfigError: the expression has used up its time.
        """
        find = self.compiled.fullmatch if whole else self.compiled.match
        while True:
            start = time.thread_time()
            try:
                found = find(text, timeout=max(self.left, UNNOTICED))
                is_complete = True
            except TimeoutError:
                is_complete = False
            taken = time.thread_time() - start
            if taken > UNNOTICED:
                self.left -= taken
            if self.left <= 0:
                raise ConfigError(
                    f"{self.field} = {self.shown!r} takes too long to match ({SECONDS:g} s were spent on it); "
                    "write it without nested or repeated wildcards"
                )
            if is_complete:
                return found


@lru_cache(maxsize=4096)
def pattern(text: str, field: str) -> Pattern:
    """A regular expression of a config field.

    Raises:
        ConfigError: it is none, or too large to be honest.
    """
    return Pattern(text, field)


def fits(text: str, path: str, field: str) -> bool:
    """The expression of a config field matches the whole of a path."""
    return pattern(text, field).match(path, whole=True) is not None
