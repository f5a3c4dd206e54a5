"""From tokens to text while an answer grows: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "�"
"""What a tokenizer decodes a part of a character to."""


class Text:
    """The text of one answer.

    Args:
        stops: the answer ends before the first of these strings.
        keep_special: special tokens are part of the text, as the marks of tool calls are.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), *, keep_special: bool = False) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(stops)
        self.keep_special = keep_special
        self.tokens: list[int] = []
        self.start = 0
        """The first token that is decoded again: a tokenizer may join it with those after it."""
        self.read = 0
        """The tokens before this one are in the text."""
        self.held = ""
        """Text that may be the beginning of a stop string."""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain."""
        self.tokens.append(token)
        before = self._decoded(self.tokens[self.start : self.read])
        now = self._decoded(self.tokens[self.start :])
        if now.endswith(INCOMPLETE) or len(now) <= len(before):
            return ""
        self.start, self.read = self.read, len(self.tokens)
        return self._without_stop(now[len(before) :])

    def finish(self) -> str:
        """The rest of the text."""
        if self.is_stopped:
            return ""
        before = self._decoded(self.tokens[self.start : self.read])
        now = self._decoded(self.tokens[self.start :])
        text = self._without_stop(now[len(before) :])
        rest, self.held = self.held, ""
        return text + rest

    def _decoded(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(
            tokens, skip_special_tokens=not self.keep_special, clean_up_tokenization_spaces=False
        )

    def _without_stop(self, text: str) -> str:
        text = self.held + text
        places = [text.find(stop) for stop in self.stops]
        found = [place for place in places if place >= 0]
        if found:
            self.is_stopped = True
            self.held = ""
            return text[: min(found)]
        held = max((begun(text, stop) for stop in self.stops), default=0)
        cut = len(text) - held
        self.held = text[cut:]
        return text[:cut]


def begun(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of a stop string."""
    for count in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
