"""Ollama's Modelfile: the model, its chat template in Ollama's language, and the texts that stop a generation.

Ollama's templates are Go templates, not Jinja. Most chat templates only put fixed texts around each message, and these
texts are found by rendering a conversation. A template that does more is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

MODELFILE = "Modelfile"
ROLES = ("system", "user", "assistant")
MARK = "\u2e28{}\u2e29"
"""A text that no chat template contains, to find where contents go."""

Messages = Sequence[tuple[str, str]]
"""(role, content) of each message."""


@dataclass(frozen=True)
class Turns:
    """A chat template that puts a fixed text before and after the content of each message, by its role."""

    start: str
    """Before the first message."""
    default_system: str
    """Before the first message if there is no system message."""
    before: dict[str, str]
    after: dict[str, str]
    answer: str
    """Before an answer that the model will write."""

    @classmethod
    def of(cls, tokenizer: Any, adds_bos: bool) -> Turns | None:
        """The turns of a tokenizer's chat template; None if it has none, or does anything else.

        Args:
            adds_bos: the first token is added when the text is tokenized, so the template leaves it out.
        """
        if tokenizer.chat_template is None:
            return None
        bos = tokenizer.bos_token if adds_bos else None
        try:
            turns = _found(tokenizer, bos)
            is_same = all(_agrees(turns, tokenizer, bos, messages) for messages in _conversations())
        except Exception:  # a template can raise anything
            return None
        return turns if is_same else None

    def render(self, messages: Messages) -> str:
        """The text of a conversation, up to where the answer starts."""
        text = self.start
        if messages[0][0] != "system":
            text += self.default_system
        for role, content in messages:
            text += self.before[role] + content + self.after[role]
        return text + self.answer

    def go(self) -> str:
        """The template in Ollama's language."""
        lines = [_escaped(self.start)]
        if self.default_system:
            default = _escaped(self.default_system)
            lines.append('{{ if ne (index .Messages 0).Role "system" }}' + default + "{{ end }}")
        lines.append("{{ range .Messages }}")
        for i, role in enumerate(role for role in ROLES if role in self.before):
            word = "if" if i == 0 else "else if"
            lines.append("{{ " + word + f' eq .Role "{role}" ' + "}}")
            lines.append(_escaped(self.before[role]) + "{{ .Content }}" + _escaped(self.after[role]))
        lines.append("{{ end }}{{ end }}")
        lines.append(_escaped(self.answer))
        return "".join(lines)


def _found(tokenizer: Any, bos: str | None) -> Turns:
    """The texts around the contents of two conversations. Whether they are those of any other is not checked here."""
    roles = ["user", "assistant", "user", "assistant"]
    has_system = _takes(tokenizer, ["system", "user"])
    if has_system:
        roles.insert(0, "system")
    messages = [(role, MARK.format(i)) for i, role in enumerate(roles)]
    pieces = _pieces(_rendered(tokenizer, bos, messages, answer=False), messages)
    question = messages[-2:-1]
    alone = _rendered(tokenizer, bos, question, answer=False)
    head, after_user = _pieces(alone, question)
    _, before_answer = _pieces(_rendered(tokenizer, bos, question, answer=True), question)
    between_turns = pieces[-3]
    after_assistant = pieces[-1]
    if not between_turns.startswith(after_assistant):  # the end of the text has more than the end of a turn
        before_user = _common_end(head, between_turns)
        after_assistant = between_turns.removesuffix(before_user)
    if not before_answer.startswith(after_user):
        after_user = after_assistant
    before_user = between_turns.removeprefix(after_assistant)
    answer = before_answer.removeprefix(after_user)
    before = {"user": before_user, "assistant": pieces[-2].removeprefix(after_user)}
    after = {"user": after_user, "assistant": after_assistant}
    first = head.removesuffix(before_user)
    if not has_system:
        return Turns(first, "", before, after, answer)
    start = first if pieces[0].startswith(first) else ""
    default = first.removeprefix(start)
    before["system"] = pieces[0].removeprefix(start)
    after["system"] = pieces[1].removesuffix(before_user)
    return Turns(start, default, before, after, answer)


def _common_end(a: str, b: str) -> str:
    """The longest text that both end with."""
    return os.path.commonprefix([a[::-1], b[::-1]])[::-1]


def _pieces(text: str, messages: Messages) -> list[str]:
    """The texts before, between and after the contents of messages.

    Raises:
        ValueError: a content is missing, or in another place.
    """
    pieces = []
    for _, content in messages:
        before, found, text = text.partition(content)
        if not found:
            raise ValueError(content)
        pieces.append(before)
    return [*pieces, text]


def _takes(tokenizer: Any, roles: list[str]) -> bool:
    """Whether the template has a place for these roles: the contents appear."""
    messages = [(role, MARK.format(i)) for i, role in enumerate(roles)]
    try:
        text = _rendered(tokenizer, None, messages, answer=True)
    except Exception:  # a template may raise anything on a role that it does not know
        return False
    return all(mark in text for _, mark in messages)


def _rendered(tokenizer: Any, bos: str | None, messages: Messages, answer: bool) -> str:
    rows = [{"role": role, "content": content} for role, content in messages]
    text = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=answer)
    return text.removeprefix(bos) if bos else text


def _conversations() -> list[Messages]:
    """Conversations on which the template is compared with its turns."""
    conversations: list[Messages] = []
    contents = ("What is this?", " two\nlines ", "x")
    for has_system, answers, content in product((False, True), (0, 1, 2), contents):
        messages = [("system", f"{content}!")] if has_system else []
        for i in range(answers):
            messages += [("user", f"{content}{i}"), ("assistant", f"{i}{content}")]
        messages.append(("user", content))
        conversations.append(messages)
    return conversations


def _agrees(turns: Turns, tokenizer: Any, bos: str | None, messages: Messages) -> bool:
    if messages[0][0] == "system" and "system" not in turns.before:
        return True
    stripped = [(role, content.strip()) for role, content in messages]  # Ollama's own contents are usually stripped
    return turns.render(stripped) == _rendered(tokenizer, bos, stripped, answer=True)


def _escaped(text: str) -> str:
    """A fixed text of a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def modelfile(gguf: str, turns: Turns | None, tokenizer: Any, stops: Sequence[int]) -> str:
    """The content of a Modelfile.

    Args:
        gguf: the name of the model's file, in the same directory.
        turns: the chat template; None: Ollama looks for one that resembles the template in the GGUF file.
        stops: ids of tokens that end a generation.
    """
    lines = [f"FROM ./{gguf}"]
    if turns is not None:
        lines.append(f'TEMPLATE """{turns.go()}"""')
    ids = [*stops]
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    texts = dict.fromkeys(tokenizer.convert_ids_to_tokens(ids))
    if turns is not None:
        end = turns.after["assistant"].strip()
        if end:
            texts[end] = None
    for text in texts:
        lines.append(f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"
