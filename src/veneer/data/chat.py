"""Which bytes of a conversation the assistant wrote, for any chat template, found by rendering it in variations.

A turn starts where the template, asked for a prompt of the messages before it, stops. Its own words end where the
rendering of another answer in its place agrees again; then comes the token that stops it, if the template has one.
Nothing is known of any template, and none needs to be edited.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError

VARIATIONS = ("q7Z", "K2x")
"""Other answers; their first and last characters differ, so that one at most can agree with the true one by chance."""
ASSISTANT = ("assistant", "model")
"""What templates call the one whose words are learned."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and where in it the assistant speaks (to the end of each stop token)."""

    text: str
    spans: list[Span]
    ended: bool
    """The last turn of the assistant has a token that stops it."""


class Template:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer, self.template = tokenizer, template
        added = {str(t): t for t in tokenizer.added_tokens_decoder.values()}
        special = {name for name, token in added.items() if token.special} | set(tokenizer.all_special_tokens)
        self.stops = sorted(special - {tokenizer.bos_token} | {tokenizer.eos_token} - {None}, key=len, reverse=True)

    def text(self, messages: Sequence[Any], tools: Any = None, prompt: bool = False) -> str:
        """The conversation as the template writes it; `prompt`: with the start of an answer."""
        return self.tokenizer.apply_chat_template(
            list(messages), tools=tools, chat_template=self.template, add_generation_prompt=prompt, tokenize=False
        )

    def prompt(self, place: str, messages: Sequence[dict[str, Any]], tools: Any = None) -> str:
        """A conversation and the start of an answer.

        Raises:
            DataError: the template refuses the conversation.
        """
        try:
            return self.text(messages, tools, prompt=True)
        except Exception as error:  # as in render
            raise _refused(place, error) from error

    def stop(self) -> str | None:
        """The token that ends an answer, if the template writes one."""
        said = [{"role": "user", "content": VARIATIONS[0]}, {"role": "assistant", "content": VARIATIONS[1]}]
        rendered = self.render("the chat template", said)
        text = rendered.text[: rendered.spans[-1][1]]
        return next((stop for stop in self.stops if text.endswith(stop)), None) if rendered.ended else None

    def render(self, place: str, messages: Sequence[dict[str, Any]], tools: Any = None) -> Rendered:
        """A conversation and its spans.

        Raises:
            DataError: the template refuses the conversation, or a turn cannot be found in what it writes.
        """
        try:
            text = self.text(messages, tools)
            turns = [i for i, message in enumerate(messages) if message["role"] in ASSISTANT]
            found = [self._turn(text, messages, i, tools) for i in turns]
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        except Exception as error:  # templates raise errors of jinja2, and whatever their authors thought of
            raise _refused(place, error) from error
        _check(place, text, [span for span, _ in found])
        return Rendered(text, [span for span, _ in found], not found or found[-1][1])

    def _turn(self, text: str, messages: Sequence[Any], i: int, tools: Any) -> tuple[Span, bool]:
        """Where one turn starts and ends, and whether a token stops it."""
        start, own = self._start(text, messages, i, tools), self._own_end(text, messages, i, tools)
        stop = self._stop_at(text, own)
        if own < start:
            raise DataError(f"cannot find the assistant's words of message {i + 1} in what the chat template writes")
        return (start, stop or own), stop is not None

    def _start(self, text: str, messages: Sequence[Any], i: int, tools: Any) -> int:
        """The end of the prompt. A template that writes what went before otherwise once the answer is there (leaves
        out "<think>", moves the tools) still has the prompt's end in common, from the words before the turn on.
        """
        prompt = self.text(messages[:i], tools, prompt=True) if i else ""
        if i and text.startswith(prompt):
            return len(prompt)
        own = min((_common(text, other) for other in self._variations(messages, i, tools)), default=None)
        if not i and own is not None:
            return own
        tail = self._rest(prompt, messages[:i], i - 1, tools, prompt=True)
        rest = self._rest(text, messages, i - 1, tools)
        if own is None or tail is None or rest is None:
            raise DataError(
                f"cannot find where the assistant's message {i + 1} starts in what the chat template writes"
            )
        before = len(text) - rest
        return before + _common(prompt[len(prompt) - tail :], text[before:own])

    def _own_end(self, text: str, messages: Sequence[Any], i: int, tools: Any) -> int:
        """Where other words in the turn's place make no difference any more."""
        rest = self._rest(text, messages, i, tools)
        if rest is not None:
            return len(text) - rest
        alone = self.text(messages[: i + 1], tools).rstrip()  # calls of tools, whose results follow, cannot be varied
        stop = next((stop for stop in self.stops if alone.endswith(stop)), "")
        return _common(text, alone[: len(alone) - len(stop)])

    def _rest(self, text: str, messages: Sequence[Any], i: int, tools: Any, prompt: bool = False) -> int | None:
        """How many characters follow the words of a message; None where the template takes no others."""
        others = self._variations(messages, i, tools, prompt)
        return min((_common(text[::-1], other[::-1]) for other in others), default=None)

    def _variations(self, messages: Sequence[Any], i: int, tools: Any, prompt: bool = False) -> list[str]:
        """The conversation with other words in one place; none where the template refuses them."""
        found = []
        for words in VARIATIONS:
            other = {key: value for key, value in messages[i].items() if key != "tool_calls"} | {"content": words}
            try:
                found.append(self.text([*messages[:i], other, *messages[i + 1 :]], tools, prompt))
            except Exception:  # as above
                return []
        return found

    def _stop_at(self, text: str, end: int) -> int | None:
        """The end of the token that stops a turn, when one follows its words or holds their last character."""
        for stop in self.stops:
            around = text.find(stop, max(0, end - len(stop) + 1), end + len(stop) - 1)
            if 0 <= around < end < around + len(stop):
                return around + len(stop)
        after = end + len(text[end:]) - len(text[end:].lstrip())
        return next((after + len(stop) for stop in self.stops if text.startswith(stop, after)), None)


def _refused(place: str, error: Exception) -> DataError:
    reason = str(error).strip().split("\n")[0]
    return DataError(f"{place}: the chat template refuses this conversation: {reason}")


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return len(os.path.commonprefix([a, b]))


def _check(place: str, text: str, spans: list[Span]) -> None:
    ends = [0, *(end for _, end in spans)]
    if any(start < before for (start, _), before in zip(spans, ends, strict=False)) or ends[-1] > len(text):
        raise DataError(f"{place}: the assistant's turns overlap in what the chat template writes; it cannot be used")
