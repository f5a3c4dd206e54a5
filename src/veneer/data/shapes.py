"""What a row says: a conversation, a prompt and its completion, plain text, or text of a class.

    messages                      a conversation: a list of {role, content, ...}; `tools` beside it
    prompt, completion            what is asked and what is learned; texts, or lists of messages
    instruction, input, output    the same, with or without an input
    question, answer              the same
    text, label                   a text and its class
    text                          plain text, all of it learned

A row with the columns of several is of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError, nearest

SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "question": ("question", "answer"),
    "label": ("text", "label"),
    "text": ("text",),
}
"""The columns of each shape."""
QUESTIONS = {"prompt": "completion", "instruction": "output", "question": "answer"}
"""The shapes that ask one thing: the column asked, and the one that answers."""


@dataclass(frozen=True)
class Example:
    """One row, understood. It has either messages, or a text, with a label or not."""

    place: str
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    text: str | None = None
    label: str | None = None
    facts: dict[str, int] = field(default_factory=dict)
    """What the method wants to know of a row (`task_ids`)."""


def shape_of(place: str, row: Mapping[str, Any], task: str = "auto") -> str:
    """The name of a row's shape.

    Raises:
        DataError: it has none; says what columns there are and which are needed.
    """
    for name, columns in SHAPES.items():
        if all(column in row for column in columns) and not (name == "label" and task == "text"):
            if task == "classification" and name != "label":
                continue
            return name
    wanted = {"label": SHAPES["label"]} if task == "classification" else SHAPES
    known = [column for columns in wanted.values() for column in columns]
    likely = "".join(f" ({c}{nearest(c, known, 1)})" for c in row if c not in known and nearest(c, known, 1))
    raise DataError(
        f"{place} has the columns {', '.join(row) or '(none)'}{likely}; it needs {_spell(wanted)}. "
        "Name them with columns (--column OURS=THEIRS)"
    )


def understand(place: str, row: Mapping[str, Any], shape: str, facts: tuple[str, ...] = ()) -> Example:
    """The example of one row.

    Raises:
        DataError: a column is missing or of the wrong type.
    """
    known = {name: _number(place, row, name) for name in facts if row.get(name) is not None}
    if shape == "messages":
        return Example(place, _messages(place, row, "messages"), row.get("tools"), facts=known)
    if shape == "label":
        return Example(place, text=_text(place, row, "text"), label=_label(place, row), facts=known)
    if shape == "text":
        return Example(place, text=_text(place, row, "text"), facts=known)
    return Example(place, _exchange(place, row, shape), row.get("tools"), facts=known)


def _exchange(place: str, row: Mapping[str, Any], asked: str) -> list[dict[str, Any]]:
    """A question and its answer as messages."""
    answer = QUESTIONS[asked]
    if isinstance(row.get(asked), list):
        return _messages(place, row, asked) + _messages(place, row, answer)
    question = _text(place, row, asked)
    if asked == "instruction" and row.get("input"):
        question += "\n\n" + _text(place, row, "input")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": _text(place, row, answer)}]


def _messages(place: str, row: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """A conversation without the nulls that Arrow's tables put into it."""
    messages = row.get(column)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: {column} must be a list of messages, not {_short(messages)}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{place}: a message is {{role, content}}, not {_short(message)}")
    return [{key: value for key, value in m.items() if value is not None} for m in messages]


def _text(place: str, row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"{place}: {column} must be text, not {_short(value)}")
    return value


def _label(place: str, row: Mapping[str, Any]) -> str:
    value = row["label"]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{place}: label must be a name or a whole number, not {_short(value)}")
    return str(value)


def _number(place: str, row: Mapping[str, Any], column: str) -> int:
    try:
        return int(row[column])
    except (TypeError, ValueError):
        raise DataError(f"{place}: {column} must be a whole number, not {_short(row[column])}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _spell(shapes: Mapping[str, tuple[str, ...]]) -> str:
    return ", or ".join(" and ".join(columns) for columns in shapes.values())
