"""Find the assistant's words in a rendered conversation, for any chat template, by rendering variations of it.

A turn starts where the prompt that the template writes for the messages before it ends. Its words end where a rendering
with other words in their place agrees with the text again. The stop token comes next, if the template has one.
This works for any template, unedited.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..errors import DataError
from .shapes import LEARNED_ROLES

VARIATIONS = ("q7Z", "K2x")
"""Replacement answers. Their first and last characters differ, so at most one can agree with the true answer there."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold the reasoning before an answer."""

SAMPLED_FROM = 4
"""Conversations with more of the assistant's turns than this have most of them located in two renderings."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with the spans of the assistant's turns (each includes its stop token)."""

    text: str
    spans: list[Span]
    ended: bool
    """The assistant's last turn ends with a stop token, or the assistant has no turn."""

    def learned_from(self, turn: int) -> Rendered:
        """The same text without the spans of the assistant's first turns."""
        return replace(self, spans=self.spans[turn:])


class MarkedCall(NamedTuple):
    """A tool call whose name and arguments are replaced by markers."""

    message: int
    """The index of its message."""
    name: str
    name_marker: str
    arguments_marker: str
    has_arguments: bool


class Template:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        special = set(tokenizer.all_special_tokens)
        for token in tokenizer.added_tokens_decoder.values():
            if token.special:
                special.add(str(token))
        special.discard(tokenizer.bos_token)
        if tokenizer.eos_token is not None:
            special.add(tokenizer.eos_token)
        self.stops = sorted(special, key=len, reverse=True)

    def text(self, messages: Sequence[Any], tools: Any = None, prompt: bool = False) -> str:
        """The conversation as the template writes it; with `prompt`, followed by the start of an answer."""
        return self.tokenizer.apply_chat_template(
            list(messages), tools=tools, chat_template=self.template, add_generation_prompt=prompt, tokenize=False
        )

    def prompt(self, place: str, messages: Sequence[dict[str, Any]], tools: Any = None) -> str:
        """A conversation followed by the start of an answer.

        Raises:
            DataError: the template refuses the conversation.
        """
        try:
            return self.text(messages, tools, prompt=True)
        except Exception as error:  # as in render
            raise _refused(place, error) from error

    def stop(self) -> str | None:
        """The token that ends an answer, None if the template writes none."""
        question = {"role": "user", "content": VARIATIONS[0]}
        answer = {"role": "assistant", "content": VARIATIONS[1]}
        rendered = self.render("the chat template", [question, answer])
        if not rendered.ended:
            return None
        _, end = rendered.spans[-1]
        return self._stop_of(rendered.text[:end])

    def render(self, place: str, messages: Sequence[dict[str, Any]], tools: Any = None) -> Rendered:
        """A conversation as text, with its spans.

        Raises:
            DataError: the template refuses the conversation, or a turn cannot be found in the text.
        """
        spans: list[Span] = []
        ended = True
        try:
            text = self.text(messages, tools)
            self._check_tool_calls(messages, tools)
            self._check_contents(text, messages, tools)
            turns = [i for i, message in enumerate(messages) if message["role"] in LEARNED_ROLES]
            located = self._located(text, messages, turns, tools) if len(turns) > SAMPLED_FROM else None
            if located is None:
                located = [self._turn(text, messages, i, tools) for i in turns]
            for span, has_stop in located:
                spans.append(span)
                ended = has_stop
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        except Exception as error:  # templates raise jinja2's errors and any others that their authors chose
            raise _refused(place, error) from error
        if not _are_ordered(spans, len(text)):
            raise DataError(f"{place}: the assistant's turns overlap in the chat template's text; it cannot be used")
        return Rendered(text, spans, ended)

    def _check_tool_calls(self, messages: Sequence[Any], tools: Any) -> None:
        """Raise if the template leaves out a tool call, which would be learned as an empty answer."""
        marked, calls = _with_marked_calls(messages)
        if not calls:
            return
        text = self.text(marked, tools)
        for call in calls:
            lost = "" if call.name_marker in text else "tool call"
            if not lost and call.has_arguments and call.arguments_marker not in text:
                lost = "arguments of the tool call"
            if lost:
                raise DataError(
                    f"the chat template does not write the {lost} {call.name!r} of message {call.message + 1}; give a "
                    "template that writes tool calls with chat_template (--chat-template)"
                )

    def _check_contents(self, text: str, messages: Sequence[Any], tools: Any) -> None:
        """Raise if the template leaves out a message, such as a system message or the result of a tool.

        A template may change a content. So of one that is not in the text as it stands, variations are rendered: if the
        template writes it, they differ.
        """
        position = 0
        for i, message in enumerate(messages):
            content = message.get("content")
            content = content.strip() if isinstance(content, str) else ""
            found = max(text.find(content, position), text.find(content))
            if found >= 0:
                position = max(position, found)
                continue
            role = message["role"]
            marked = self._variations(messages, i, tools)
            if marked and len(set(marked)) == 1:
                raise DataError(
                    f"the chat template does not write message {i + 1}, whose role is {role!r}; leave such "
                    "messages out, or give a template that writes them with chat_template (--chat-template)"
                )

    def left_out(self, text: str, messages: Sequence[Any], tools: Any) -> list[str]:
        """What else of a conversation the template does not write, in words: tools, and the reasoning of an answer."""
        parts = []
        names = [tool.get("function", tool).get("name") for tool in tools or () if isinstance(tool, dict)]
        if any(isinstance(name, str) and name not in text for name in names):
            parts.append("tools that the chat template does not write")
        for key in REASONING:
            thoughts = [message[key].strip() for message in messages if isinstance(message.get(key), str)]
            if any(thought not in text for thought in thoughts):
                parts.append(f"{key} that the chat template does not write")
        return parts

    def _located(
        self, text: str, messages: Sequence[Any], turns: Sequence[int], tools: Any
    ) -> list[tuple[Span, bool]] | None:
        """What `_turn` returns for each of many turns, in a time that grows with the text and not with its square.

        One rendering with a marker in the place of each answer shows what the template writes between the answers. If
        the text is just that with the answers in between, their words are known, and a turn starts as far from its
        words as the first, the second and the last turn do. None if any of this does not hold.
        """
        words = self._words(text, messages, turns, tools)
        if words is None:
            return None
        offsets = set()
        for place in (0, 1, len(turns) - 1):
            (start, _), _ = self._turn(text, messages, turns[place], tools)
            offsets.add(start - words[place][0])
        if len(offsets) > 1:
            return None
        offset = offsets.pop()
        located = []
        for start, end in words:
            stop_end = self._stop_end(text, end)
            located.append(((start + offset, stop_end or end), stop_end is not None))
        return located

    def _words(self, text: str, messages: Sequence[Any], turns: Sequence[int], tools: Any) -> list[Span] | None:
        """The spans of the words of several turns; None if the template writes the answers in their context."""
        marked = list(messages)
        for place, i in enumerate(turns):
            if not isinstance(messages[i].get("content"), str) or messages[i].get("tool_calls"):
                return None
            marked[i] = {**messages[i], "content": f"{VARIATIONS[0]}{place}{VARIATIONS[1]}"}
        rest = self.text(marked, tools)
        spans = []
        position = 0
        for place, i in enumerate(turns):
            before, marker, rest = rest.partition(marked[i]["content"])
            if not marker or not text.startswith(before, position):
                return None
            start = position + len(before)
            content = messages[i]["content"]
            following = rest.partition(f"{VARIATIONS[0]}{place + 1}{VARIATIONS[1]}")[0]
            forms = (content, content.strip(), content.lstrip(), content.rstrip())
            written = next((form for form in forms if text.startswith(form + following, start)), None)
            if written is None:
                return None
            position = start + len(written)
            spans.append((start, position))
        return spans if text[position:] == rest else None

    def _turn(self, text: str, messages: Sequence[Any], i: int, tools: Any) -> tuple[Span, bool]:
        """The span of message `i`, and whether it ends with a stop token."""
        start = self._start(text, messages, i, tools)
        words_end = self._words_end(text, messages, i, tools)
        if words_end < start:
            raise DataError(f"cannot find the assistant's words of message {i + 1} in the chat template's text")
        stop_end = self._stop_end(text, words_end)
        if stop_end is None:
            return (start, words_end), False
        return (start, stop_end), True

    def _start(self, text: str, messages: Sequence[Any], i: int, tools: Any) -> int:
        """Where message `i` starts: at the end of the prompt, if the text begins with the prompt."""
        if i == 0:
            start = self._words_start(text, messages, i, tools)
        else:
            prompt = self.text(messages[:i], tools, prompt=True)
            if text.startswith(prompt):
                return len(prompt)
            start = self._start_after_previous(text, prompt, messages, i, tools)
        if start is None:
            raise DataError(f"cannot find where the assistant's message {i + 1} starts in the chat template's text")
        return start

    def _start_after_previous(self, text: str, prompt: str, messages: Sequence[Any], i: int, tools: Any) -> int | None:
        """Where message `i` starts, if an answer changes how the template writes the messages before it.

        Such a template leaves out "<think>", or moves the tools. Its text and its prompt still agree from the words of
        the previous message to the start of this one.
        """
        words_start = self._words_start(text, messages, i, tools)
        prompt_rest = self._rest(prompt, messages[:i], i - 1, tools, prompt=True)
        text_rest = self._rest(text, messages, i - 1, tools)
        if words_start is None or prompt_rest is None or text_rest is None:
            return None
        previous_end = len(text) - text_rest
        end_of_prompt = prompt[len(prompt) - prompt_rest :]
        return previous_end + _common(end_of_prompt, text[previous_end:words_start])

    def _words_start(self, text: str, messages: Sequence[Any], i: int, tools: Any) -> int | None:
        """Where the words of message `i` start; None if the template refuses other words."""
        variations = self._variations(messages, i, tools)
        if not variations:
            return None
        return _common(text, *variations)

    def _words_end(self, text: str, messages: Sequence[Any], i: int, tools: Any) -> int:
        """Where the words of message `i` end."""
        rest = self._rest(text, messages, i, tools)
        if rest is not None:
            return len(text) - rest
        # The message calls tools, and their results follow: templates do not accept other words in its place.
        until_end = self.text(messages[: i + 1], tools).rstrip()
        stop = self._stop_of(until_end)
        if stop is not None:
            until_end = until_end.removesuffix(stop)
        return _common(text, until_end)

    def _rest(self, text: str, messages: Sequence[Any], i: int, tools: Any, prompt: bool = False) -> int | None:
        """How many characters follow the words of message `i`; None if the template refuses other words."""
        variations = self._variations(messages, i, tools, prompt)
        if not variations:
            return None
        reversed_variations = [variation[::-1] for variation in variations]
        return _common(text[::-1], *reversed_variations)

    def _variations(self, messages: Sequence[Any], i: int, tools: Any, prompt: bool = False) -> list[str]:
        """Renderings of the conversation with other words in message `i`; empty if the template refuses them."""
        texts: list[str] = []
        for words in VARIATIONS:
            message = dict(messages[i])
            message.pop("tool_calls", None)
            message["content"] = words
            try:
                text = self.text([*messages[:i], message, *messages[i + 1 :]], tools, prompt)
            except Exception:  # as in render
                return []
            texts.append(text)
        return texts

    def _stop_of(self, text: str) -> str | None:
        """The stop token at the end of a text."""
        for stop in self.stops:
            if text.endswith(stop):
                return stop
        return None

    def _stop_end(self, text: str, end: int) -> int | None:
        """The end of the stop token that follows the words up to `end`, or that contains their last character."""
        for stop in self.stops:
            start = text.find(stop, max(0, end - len(stop) + 1), end + len(stop) - 1)
            if 0 <= start < end < start + len(stop):
                return start + len(stop)
        start = end
        while text[start : start + 1].isspace():
            start += 1
        for stop in self.stops:
            if text.startswith(stop, start):
                return start + len(stop)
        return None


def _with_marked_calls(messages: Sequence[Any]) -> tuple[list[Any], list[MarkedCall]]:
    """The messages with a marker in the place of each tool call's name and arguments, and where the markers are."""
    marked = []
    calls: list[MarkedCall] = []
    for i, message in enumerate(messages):
        new_calls = []
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else {}
            name = function.get("name")
            if not isinstance(name, str):
                new_calls.append(call)
                continue
            number = f"{len(calls)}x"
            has_arguments = bool(function.get("arguments"))
            mark = MarkedCall(i, name, VARIATIONS[0] + number, VARIATIONS[1] + number, has_arguments)
            calls.append(mark)
            changed = {"name": mark.name_marker}
            if has_arguments:
                arguments: Any = {mark.arguments_marker: 1}
                is_text = isinstance(function["arguments"], str)
                changed["arguments"] = json.dumps(arguments) if is_text else arguments
            new_function = {**function, **changed}
            new_calls.append({**call, "function": new_function} if "function" in call else new_function)
        marked.append({**message, "tool_calls": new_calls} if new_calls else message)
    return marked, calls


def _refused(place: str, error: Exception) -> DataError:
    reason = str(error).strip().split("\n")[0]
    return DataError(f"{place}: the chat template refuses this conversation: {reason}")


def _common(*texts: str) -> int:
    """The number of characters at the beginning that all texts have in common."""
    return len(os.path.commonprefix(texts))


def _are_ordered(spans: list[Span], length: int) -> bool:
    """Whether the spans follow one another within a text of this length."""
    position = 0
    for start, end in spans:
        if start < position:
            return False
        position = end
    return position <= length
