"""A row as its model sees it: the text of each token, and whether the token is learned, given or cut off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from .encode import IGNORED, Encoded, Seen

LEARNED = "learned"
GIVEN = "given"
CUT = "cut"
LEFT_OUT = "left out"
"""The kind of a piece that says how many tokens are not shown."""
LONGEST_RUN = 400
"""Tokens of one kind in a row; of more, only the beginning and the end are shown."""
SHOWN_START = 250
SHOWN_END = 100
MOST_BYTES = 8
"""Tokens that one character can consist of, at most."""
HALF = "\ufffd"
"""What the text of tokens that are a part of a character ends in."""


class Piece(NamedTuple):
    """The text of a token, or of the few tokens that a character consists of."""

    text: str
    kind: str


def row_facts(row: Seen, tokenizer: Any, labels: Sequence[str] | None = None) -> dict[str, Any]:
    """A row for a report in JSON.

    Args:
        labels: the classes in order, for classification.

    Returns:
        place; answer, chosen or rejected for a pair, else None; tokens, learned and cut, as counts; dropped, whether
        the row is left out of training; label, the class or None; pieces, [text, kind] of each token.
    """
    kinds = token_kinds(row)
    number = row.whole["labels"]
    is_classified = labels is not None and not isinstance(number, list)
    return {
        "place": row.example.place,
        "answer": row.answer,
        "tokens": len(kinds),
        "learned": kinds.count(LEARNED),
        "cut": kinds.count(CUT),
        "dropped": row.kept is None,
        "label": labels[number] if labels is not None and is_classified else None,
        "pieces": [list(piece) for piece in pieces(tokenizer, row.whole["input_ids"], kinds)],
    }


def token_kinds(row: Seen) -> list[str]:
    """The kind of each token of the whole row. Nothing is learned from a row that is dropped."""
    whole = row.whole
    length = len(whole["input_ids"])
    if row.kept is None:
        if _is_learned(whole).count(True) > 0:
            return [CUT] * length
        return [GIVEN] * length
    limit = len(row.kept["input_ids"])
    kinds = [LEARNED if learned else GIVEN for learned in _is_learned(whole)[:limit]]
    return kinds + [CUT] * (length - limit)


def _is_learned(encoded: Encoded) -> list[bool]:
    """For each token, whether the loss counts it. No token predicts the first of a sequence."""
    labels = encoded["labels"]
    if not isinstance(labels, list):
        return [False] * len(encoded["input_ids"])
    return [i > 0 and label != IGNORED for i, label in enumerate(labels)]


def pieces(tokenizer: Any, ids: Sequence[int], kinds: Sequence[str]) -> Iterator[Piece]:
    """The text of each token, in order. Long runs of one kind are shown by their beginning and their end."""
    position = 0
    for kind, run in groupby(kinds):
        end = position + len(list(run))
        if end - position <= LONGEST_RUN:
            yield from _texts(tokenizer, ids, position, end, kind)
        else:
            head = position + SHOWN_START
            tail = end - SHOWN_END
            yield from _texts(tokenizer, ids, position, head, kind)
            yield Piece(f"{tail - head:,} tokens", LEFT_OUT)
            yield from _texts(tokenizer, ids, tail, end, kind)
        position = end


def _texts(tokenizer: Any, ids: Sequence[int], start: int, end: int, kind: str) -> Iterator[Piece]:
    """The text of each token from start to end; tokens that are parts of one character are one piece."""
    while start < end:
        after = start + 1
        text = _text(tokenizer, ids, start, after)
        while text.endswith(HALF) and after < min(end, start + MOST_BYTES):
            after += 1
            text = _text(tokenizer, ids, start, after)
        yield Piece(text, kind)
        start = after


def _text(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> str:
    """The text of some tokens. A tokenizer may leave out a space at the start of a text, so the token before is decoded
    with them."""
    settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    if start == 0:
        return str(tokenizer.decode(ids[:end], **settings))
    before = tokenizer.decode(ids[start - 1 : start], **settings)
    text = tokenizer.decode(ids[start - 1 : end], **settings)
    if not text.startswith(before) or before.endswith(HALF):
        text = tokenizer.decode(ids[start:end], **settings)
        return str(text)
    return str(text[len(before) :])
