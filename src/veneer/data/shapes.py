"""The shapes of rows: conversations, prompts with completions, labelled texts and plain texts.

    messages                      a conversation, a list of {role, content, ...}; optional column `tools`
    conversations                 the same, of {from, value} as in ShareGPT or of {role, content}
    prompt, completion            the completion is learned; both are texts or lists of messages
    instruction, input, output    the same; `input` is optional
    question, answer              the same
    text, label                   a text and its class
    text                          a plain text, all of it learned

A row with the columns of several shapes has the first of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from ..errors import DataError, nearest

SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "question": ("question", "answer"),
    "label": ("text", "label"),
    "text": ("text",),
}
"""The columns of each shape."""
QUESTIONS = {"prompt": "completion", "instruction": "output", "question": "answer"}
"""Shapes with a question and an answer: the column of the question, and that of the answer."""
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "observation": "tool",
}
"""Other names of roles, in lower case, and the names that chat templates have."""
TEMPLATE_ROLES = ("system", "user", "assistant", "tool")
"""Roles that are recognised in any case, such as "Assistant"."""
LEARNED_ROLES = ("assistant", "model")
"""Roles whose messages are learned."""
KNOWN_ROLES = (*TEMPLATE_ROLES, "model", "developer", "function", "ipython")
PREFERENCES = ("chosen", "rejected")
"""Columns of pairs of a better and a worse answer."""


@dataclass(frozen=True)
class Example:
    """A row that has been read: messages, a text, or a text with a label."""

    place: str
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    text: str | None = None
    label: str | None = None
    learned_from: int = 0
    """The first message that may be learned; those before it are a prompt, whoever says them."""
    facts: dict[str, int] = field(default_factory=dict)
    """Integers that the method reads per row, such as `task_ids`."""


def shape_of(place: str, row: Mapping[str, Any], task: str = "auto") -> str:
    """The name of a row's shape.

    Raises:
        DataError: no shape fits; says which columns there are and which are needed.
    """
    shapes = {"label": SHAPES["label"]} if task == "classification" else SHAPES
    if isinstance(row.get("label"), bool) and "completion" in row:
        raise DataError(
            f"{place} has a completion and a label that says whether it is good, but every completion is learned here: "
            "leave out the bad ones, and the column label, or train on both with TRL's KTOTrainer and "
            "peft_config=LoraConfig()"
        )
    for name, columns in shapes.items():
        if name == "label" and task == "text":
            continue
        if all(column in row for column in columns):
            return name
    if all(column in row for column in PREFERENCES):
        ours = "completion" if "prompt" in row else "messages"
        raise DataError(
            f"{place} has a chosen and a rejected answer. To learn from both, train with --objective dpo, orpo or "
            f"simpo; to take one as the answer, name it with columns (--column {ours}=chosen)"
        )
    present = ", ".join(row) or "(none)"
    meant = slips(row, chain.from_iterable(shapes.values()))
    needed = ", or ".join(" and ".join(columns) for columns in shapes.values())
    raise DataError(
        f"{place} has the columns {present}{meant}; it needs {needed}. Name them with columns (--column OURS=THEIRS)"
    )


def slips(row: Mapping[str, Any], columns: Iterable[str]) -> str:
    """The unknown columns of a row that resemble one of those needed, for an error message."""
    known = list(columns)
    found = ""
    for column in row:
        hint = nearest(column, known, 1)
        if column not in known and hint:
            found += f" ({column}{hint})"
    return found


def understand(place: str, row: Mapping[str, Any], shape: str, facts: tuple[str, ...] = ()) -> Example:
    """Read a row of a known shape.

    Raises:
        DataError: a column is missing or of the wrong type.
    """
    numbers = integers(place, row, facts)
    if shape in ("text", "label"):
        text = _text(place, row, "text")
        label = _label(place, row) if shape == "label" else None
        return Example(place, text=text, label=label, facts=numbers)
    tools = row.get("tools")
    if shape in ("messages", "conversations"):
        return Example(place, messages_in(place, row, shape), tools, facts=numbers)
    return Example(place, _exchange(place, row, shape), tools, facts=numbers)


def integers(place: str, row: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, int]:
    """The integers in the named columns, as far as the row has them."""
    return {name: _number(place, row, name) for name in names if row.get(name) is not None}


def _exchange(place: str, row: Mapping[str, Any], question_column: str) -> list[dict[str, Any]]:
    """A question and its answer as messages."""
    answer_column = QUESTIONS[question_column]
    if isinstance(row.get(question_column), list):
        return messages_in(place, row, question_column) + messages_in(place, row, answer_column)
    question = _text(place, row, question_column)
    if question_column == "instruction" and row.get("input"):
        question += "\n\n" + _text(place, row, "input")
    answer = _text(place, row, answer_column)
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def messages_in(place: str, row: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """The messages in a column: without null fields, with the roles of chat templates, content parts joined."""
    messages = row.get(column)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: {column} must be a list of messages, not {short(messages)}")
    cleaned = []
    for message in messages:
        if isinstance(message, dict) and "role" not in message and "from" in message:
            message = {"role": message["from"], "content": message.get("value")}
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{place}: a message is {{role, content}}, not {short(message)}")
        fields = {key: value for key, value in message.items() if value is not None}
        fields["role"] = _role(message["role"])
        if isinstance(fields.get("content"), list):
            fields["content"] = _joined(place, fields["content"])
        cleaned.append(fields)
    _check_roles(place, cleaned)
    return cleaned


def _check_roles(place: str, messages: list[dict[str, Any]]) -> None:
    """Raise for a conversation in which nothing is said to be the assistant's, because a role has an unknown name."""
    roles = list(dict.fromkeys(message["role"] for message in messages))
    unknown = [role for role in roles if role not in KNOWN_ROLES]
    if unknown and not set(roles).intersection(LEARNED_ROLES):
        raise DataError(
            f"{place}: no message is the assistant's; the roles are {', '.join(roles)}. Name them system, user, "
            "assistant and tool"
        )


def _role(name: str) -> str:
    """The name that chat templates have for a role; a name that is not known stays as it is."""
    lower = name.lower()
    if lower in TEMPLATE_ROLES:
        return lower
    return ROLES.get(lower, name)


def _joined(place: str, parts: list[Any]) -> str:
    """The text of a content that is given in parts, as in OpenAI's API.

    Raises:
        DataError: a part is no text.
    """
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise DataError(f"{place}: a message has a part that is not text: {short(part)}")
    return "".join(texts)


def _text(place: str, row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"{place}: {column} must be text, not {short(value)}")
    return value


def _label(place: str, row: Mapping[str, Any]) -> str:
    value = row["label"]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{place}: label must be a name or a whole number, not {short(value)}")
    return str(value)


def _number(place: str, row: Mapping[str, Any], column: str) -> int:
    value = row[column]
    try:
        return int(value)
    except (TypeError, ValueError):
        raise DataError(f"{place}: {column} must be a whole number, not {short(value)}") from None


def short(value: Any) -> str:
    """The value in at most 60 characters, for an error message."""
    text = repr(value)
    if len(text) <= 60:
        return text
    return text[:57] + "..."
