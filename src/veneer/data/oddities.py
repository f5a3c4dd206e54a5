"""Marks of rows that may not be what was meant: characters from a wrong encoding, roles out of order, lost answers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from .encode import IGNORED, Encoded, Seen, learned_tokens
from .shapes import LEARNED_ROLES, Example

MOJIBAKE = re.compile("[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac|\u00ef\u00bb\u00bf")
"""UTF-8 that was read as Latin-1 or Windows-1252: an accented letter, a quotation mark, a byte-order mark."""
PLAIN_CONTROLS = "\t\n\r"
JOINERS = "\u200c\u200d\u200e\u200f"
"""Invisible characters that emoji and some scripts need."""


def oddities(row: Seen, tokenizer: Any) -> list[str]:
    """What is unusual about a row, in words that continue "1 row has"; the notes of its encoding are not repeated."""
    found = list(dict.fromkeys(_of_texts(row.example, tokenizer)))
    found += _of_roles(row.example.messages or [])
    if row.kept is not None:
        found += _of_tokens(row.whole, row.kept, tokenizer)
    return found


def _of_texts(example: Example, tokenizer: Any) -> Iterator[str]:
    for text in _texts(example):
        yield from _characters(text)
        if not text.strip():
            yield "an empty text"
        if any(token in text for token in tokenizer.all_special_tokens):
            yield "special tokens in its text"


def _texts(example: Example) -> list[str]:
    """The texts of a row; an empty answer is noted by its encoding."""
    if example.text is not None:
        return [example.text]
    texts = []
    for message in example.messages or []:
        content = message.get("content")
        is_empty_answer = message["role"] in LEARNED_ROLES and not str(content or "").strip()
        if isinstance(content, str) and not is_empty_answer:
            texts.append(content)
    return texts


def _characters(text: str) -> Iterator[str]:
    """What is unusual about the characters of a text."""
    if text.isascii() and text.isprintable():
        return
    if MOJIBAKE.search(text):
        yield "text that looks like UTF-8 read in another encoding"
    for character in set(text):
        kind = unicodedata.category(character)
        if character == "\ufffd":
            yield "characters that were lost in a conversion (U+FFFD)"
        elif kind == "Cc" and character not in PLAIN_CONTROLS:
            yield "control characters"
        elif kind == "Cf" and character not in JOINERS:
            yield "invisible characters"
        elif kind in ("Co", "Cn"):
            yield "characters that Unicode does not define"


def _of_roles(messages: list[dict[str, Any]]) -> Iterator[str]:
    """What is unusual about the order of a conversation's roles."""
    roles = [message["role"] for message in messages]
    if not roles:
        return
    if "system" in roles[1:]:
        yield "a system message that is not the first"
    turns = [role for role in roles if role in ("user", *LEARNED_ROLES)]
    if any(one == other == "user" for one, other in zip(turns, turns[1:], strict=False)):
        yield "two messages of the user in a row"
    if turns and turns[0] in LEARNED_ROLES:
        yield "an answer before any question"
    if roles[-1] not in LEARNED_ROLES:
        yield "a last message that is not the assistant's"


def _of_tokens(whole: Encoded, kept: Encoded, tokenizer: Any) -> Iterator[str]:
    """What is unusual about the tokens of a row that is trained on."""
    unknown = tokenizer.unk_token_id
    specials_are_text = unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    if unknown is not None and not specials_are_text and unknown in whole["input_ids"]:
        yield "text that the tokenizer does not know"
    if not isinstance(whole["labels"], list):
        return
    if 2 * learned_tokens(kept) < learned_tokens(whole):
        yield "more than half of its learned tokens cut off"
    if learned_tokens(kept) == 1 and whole["labels"].count(IGNORED) > 0:
        yield "a single learned token"
