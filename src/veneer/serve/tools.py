"""Tool calls in answers, in the form in which the model's chat template writes them.

The form is found by rendering a conversation with calls whose names and arguments are known marks: what the template
writes before, between and after them is what an answer has there too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.chat import VARIATIONS, Template

NAMES = (f"{VARIATIONS[0]}0", f"{VARIATIONS[0]}1")
ARGUMENTS = (f"{VARIATIONS[1]}0", f"{VARIATIONS[1]}1")
IDS = ("markedId0", "markedId1")
"""Of nine letters and digits, as Mistral's templates want them."""
QUESTION = {"role": "user", "content": "q"}


@dataclass(frozen=True)
class Call:
    """A call of a tool in an answer."""

    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True)
class Form:
    """How a template writes calls as JSON: `opening`, a name, `middle`, an object, then `between` or `closing`."""

    opening: str
    middle: str
    between: str | None
    """What stands between two calls; None if the template writes one call only."""
    closing: str

    def find(self, text: str) -> tuple[str, list[Call]]:
        """The words before the calls in an answer, and the calls; no calls if the text has none or is damaged."""
        words, opening, rest = text.partition(self.opening)
        if not opening:
            return text, []
        calls: list[Call] = []
        while True:
            name, middle, rest = rest.partition(self.middle)
            if not middle:
                return text, []
            try:
                arguments, end = json.JSONDecoder().raw_decode(rest)
            except (json.JSONDecodeError, RecursionError):
                return text, []
            if not isinstance(arguments, dict):
                return text, []
            calls.append(Call(name, json.dumps(arguments, ensure_ascii=False)))
            rest = rest[end:]
            if self.between is None or not rest.startswith(self.between):
                return words.rstrip(), calls
            rest = rest.removeprefix(self.between)


def form_of(template: Template) -> Form | None:
    """The form of tool calls in a template; None if it writes none, or not as a name and a JSON object."""
    one = _rendered(template, 1)
    if one is None:
        return None
    before, name, rest = one.partition(NAMES[0])
    marked = json.dumps({ARGUMENTS[0]: 1})
    middle, arguments, closing = rest.partition(marked)
    has_id = any(mark in before + middle for mark in IDS)  # which only the server could make up
    if has_id or not (name and arguments and before.strip() and middle.strip()):
        return None
    two = _rendered(template, 2)
    between = None
    if two is not None:
        _, first, rest = two.partition(marked)
        between, second, _ = rest.partition(NAMES[1])
        is_plain = bool(first and second) and not any(mark in between for mark in IDS)
        between = between if is_plain else None
    return Form(before.lstrip(), middle, between, closing)


def _rendered(template: Template, count: int) -> str | None:
    """What the template writes for an answer that is `count` calls; None if it refuses them."""
    calls = []
    for number in range(count):
        function = {"name": NAMES[number], "arguments": {ARGUMENTS[number]: 1}}
        calls.append({"type": "function", "id": IDS[number], "function": function})
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    try:
        prompt = template.text([QUESTION], prompt=True)
        text = template.text([QUESTION, answer])
    except Exception:  # a template may raise anything
        return None
    return text.removeprefix(prompt) if text.startswith(prompt) else None


def as_dicts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: the arguments of calls are objects, not JSON texts."""
    changed = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or ():
            function = dict(call["function"])
            function["arguments"] = json.loads(function["arguments"] or "{}")
            calls.append({**call, "function": function})
        changed.append({**message, "tool_calls": calls} if calls else message)
    return changed
