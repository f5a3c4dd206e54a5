"""Encode examples as token ids and labels within a length limit, and count what was cut or dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, counted
from .chat import Rendered, Span, Template
from .shapes import KNOWN_ROLES, LEARNED_ROLES, Example

IGNORED = -100
"""The label of a token that is masked: it is not learned."""
EMPTY = "an empty answer, from which only the end of an answer is learned"
"""The note of a row with an empty answer."""
Encoded = dict[str, Any]
"""`input_ids`, a list of token ids, and `labels`, a list of the same length or the number of a class."""


MOST_PLACES = 5
"""Rows of a kind whose places are kept."""
FIRST = 3
"""Rows that are kept as they are, to show what the model sees."""


@dataclass
class Note:
    """Rows that have something in common."""

    rows: int = 0
    places: list[str] = field(default_factory=list)
    """The places of the first of them."""

    def add(self, place: str) -> None:
        """Count a row."""
        self.rows += 1
        if len(self.places) < MOST_PLACES:
            self.places.append(place)


@dataclass(frozen=True)
class Seen:
    """A row before and after the length limit."""

    example: Example
    whole: Encoded
    """The row at its whole length."""
    kept: Encoded | None
    """What is trained on; None if the row is dropped."""
    answer: str | None = None
    """Which answer of a pair this is: chosen or rejected."""


@dataclass
class Account:
    """Counts of the rows read, kept, cut and dropped."""

    rows: int = 0
    """Rows read."""
    kept: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    too_long_rows: int = 0
    """Rows dropped because they are longer than the limit."""
    unlearned_rows: int = 0
    """Rows dropped because no token is learned: the answer was cut off, or there is none."""
    open_rows: int = 0
    """Rows whose last answer has no stop token in the template, so the tokenizer's end-of-text token was added."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Number of rows of each length, before cutting."""
    examples: list[str] = field(default_factory=list)
    """Places of the first five rows that were cut or dropped."""

    notes: dict[str, Note] = field(default_factory=dict)
    """Rows that are learned, but perhaps not as they were meant, by what they have: "an empty answer"."""

    def noticed(self, what: str, place: str) -> None:
        """Count a row that has something remarkable."""
        self.notes.setdefault(what, Note()).add(place)

    def remarks(self) -> list[str]:
        """The notes, a line for each."""
        lines = []
        for what, note in self.notes.items():
            rows = "1 row has" if note.rows == 1 else f"{note.rows:,} rows have"
            lines.append(f"{rows} {what} (the first: {note.places[0]})")
        return lines

    def warnings(self, max_length: int) -> list[str]:
        """A line for each way in which rows were cut or dropped, and the notes."""
        first = f" (the first: {self.examples[0]})" if self.examples else ""
        lines = []
        if self.cut_rows:
            cut = counted(self.cut_rows, "row")
            lines.append(f"{cut} cut to {max_length} tokens, {self.cut_tokens} tokens lost{first}")
        if self.too_long_rows:
            too_long = counted(self.too_long_rows, "row")
            lines.append(f"{too_long} dropped, longer than {max_length} tokens{first}")
        if self.unlearned_rows:
            unlearned = counted(self.unlearned_rows, "row")
            lines.append(f"{unlearned} dropped, with no token to learn{first}")
        return lines + self.remarks()

    def touched(self, place: str) -> None:
        """Keep the place of a row that was cut or dropped, if it is one of the first."""
        if len(self.examples) < MOST_PLACES and place not in self.examples:
            self.examples.append(place)

    def as_dict(self) -> dict[str, Any]:
        """The counts for a report in JSON, lengths last and in order."""
        counts = dict(vars(self))
        counts["notes"] = {what: vars(note) for what, note in self.notes.items()}
        del counts["lengths"]
        counts["lengths"] = {str(length): self.lengths[length] for length in sorted(self.lengths)}
        return counts


class Encoder:
    """Turns examples into tokens and labels.

    Args:
        max_length: the longest row in tokens.
        long_rows: what to do with longer rows, "cut" or "drop".
        loss_on: which tokens are learned, "assistant" or "all".
        template_file: a chat template to use instead of the tokenizer's.
        labels: the classes in order, for classification.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        long_rows: str = "cut",
        loss_on: str = "assistant",
        template_file: str | Path | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.long_rows = long_rows
        self.loss_on = loss_on
        template = tokenizer.chat_template
        if template_file:
            template = Path(template_file).read_text(encoding="utf-8")
        self.template = Template(tokenizer, template) if template else None
        self.numbers = None if labels is None else {name: number for number, name in enumerate(labels)}
        self.account = Account()
        self.first: list[Seen] = []
        """The first rows, before and after the length limit."""

    def encode(self, examples: Iterable[Example]) -> Iterator[Encoded]:
        """Yield the rows that have a token to learn, and count all of them."""
        for example in examples:
            (row,) = self.seen(example)
            if row.kept is not None:
                yield row.kept | example.facts

    def seen(self, example: Example) -> list[Seen]:
        """Encode a row, apply the length limit, and count it. A list of one: a pair has two."""
        self.account.rows += 1
        whole = self.tokens(example)
        kept = self._limited(example.place, whole)
        if kept is not None:
            self._count(kept)
        row = Seen(example, whole, kept)
        if len(self.first) < FIRST:
            self.first.append(row)
        return [row]

    def tokens(self, example: Example) -> Encoded:
        """The encoded row of one example, whatever its length."""
        if example.label is not None:
            return self._classified(example)
        if example.text is not None:
            return self._plain(example.text)
        messages = example.messages or []
        for what in _remarkable(messages):
            self.account.noticed(what, example.place)
        if self.template is None:
            return self._untemplated(example.place, messages)
        rendered = self.template.render(example.place, messages, example.tools)
        if example.learned_from:
            rendered = rendered.learned_from(_turns(messages[: example.learned_from]))
        for part in self.template.left_out(rendered.text, messages, example.tools):
            self.account.noticed(part, example.place)
        if rendered.ended:
            return self._masked(rendered.text, rendered.spans)
        self.account.open_rows += 1
        return self._ended(rendered)

    def _ended(self, rendered: Rendered) -> Encoded:
        """A conversation whose template writes no stop token, with the tokenizer's end-of-text token instead."""
        *spans, (start, end) = rendered.spans
        text = rendered.text[:end] + (self.tokenizer.eos_token or "")
        return self._masked(text, [*spans, (start, len(text))])

    def asked(self, example: Example) -> tuple[list[int], str]:
        """The prompt of a conversation's last answer as tokens, and that answer.

        Raises:
            DataError: the row has no question and answer.
        """
        *before, last = example.messages or [{}]
        answer = last.get("content")
        if not before or last["role"] not in LEARNED_ROLES or not isinstance(answer, str):
            raise DataError(f"{example.place} has no question with an answer as text, which generation needs")
        if self.template is None:
            text = self._question(example.place, example.messages or [])
        else:
            text = self.template.prompt(example.place, before, example.tools)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids), answer

    def _untemplated(self, place: str, messages: list[dict[str, Any]]) -> Encoded:
        """A question and its answer for a model without a chat template."""
        prompt = self._question(place, messages)
        end = self.tokenizer.eos_token or ""
        text = prompt + messages[1]["content"] + end
        return self._masked(text, [(len(prompt), len(text))])

    def _question(self, place: str, messages: list[dict[str, Any]]) -> str:
        """The prompt for a model without a chat template: the question, with a line break before the answer."""
        if [m["role"] for m in messages] != ["user", "assistant"]:
            raise ConfigError(f"{place} is a conversation, but the tokenizer has no chat template; give chat_template")
        question = messages[0]["content"]
        answer = messages[1]["content"]
        start = ""
        if self._adds_bos() and not question.startswith(self.tokenizer.bos_token):
            start = self.tokenizer.bos_token
        is_separated = question[-1:].isspace() or answer[:1].isspace()
        separator = "" if is_separated else "\n"
        return start + question + separator

    def _adds_bos(self) -> bool:
        """Whether the tokenizer puts a start token before every text."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a").input_ids[0] == bos

    def _plain(self, text: str) -> Encoded:
        """A plain text followed by the end-of-text token; all tokens are learned."""
        ids = self._with_specials(text)
        end = self.tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        return {"input_ids": ids, "labels": list(ids)}

    def _classified(self, example: Example) -> Encoded:
        assert self.numbers is not None
        if example.label not in self.numbers:
            raise DataError(f"{example.place}: the label {example.label!r} is not one of {', '.join(self.numbers)}")
        ids = self._with_specials(example.text or "")
        return {"input_ids": ids, "labels": self.numbers[example.label]}

    def _with_specials(self, text: str) -> list[int]:
        """The tokens of a text with the tokenizer's special ones; a start token that the text has is not repeated."""
        ids = list(self.tokenizer(text).input_ids)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        return ids

    def _masked(self, text: str, spans: list[Span]) -> Encoded:
        """The tokens of a text; those inside the spans are learned.

        A token that crosses the start of a span would teach bytes that are not the assistant's, and could not be
        generated after the prompt. A text with such a token is tokenised piece by piece.
        """
        is_fast = self.tokenizer.is_fast
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=is_fast)
        ids = list(encoded.input_ids)
        inside: list[bool | None] | None = None
        if is_fast:
            inside = _inside(encoded.offset_mapping, spans)
        if inside is None or None in inside:
            ids, inside = self._by_pieces(text, spans)
        if self.loss_on == "all":
            return {"input_ids": ids, "labels": list(ids)}
        labels = [token if learned else IGNORED for token, learned in zip(ids, inside, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def _by_pieces(self, text: str, spans: list[Span]) -> tuple[list[int], list[bool | None]]:
        """Token ids, and whether each is inside a span, with the spans tokenised apart from the rest."""
        ids: list[int] = []
        inside: list[bool | None] = []
        edges = [0, *chain.from_iterable(spans), len(text)]
        for number, (start, end) in enumerate(pairwise(edges)):
            piece = list(self.tokenizer(text[start:end], add_special_tokens=False).input_ids)
            is_span = number % 2 == 1
            ids += piece
            inside += [is_span] * len(piece)
        return ids, inside

    def _limited(self, place: str, encoded: Encoded) -> Encoded | None:
        """The row, cut to the length limit if necessary; None if it is dropped. Both cases are counted."""
        account = self.account
        length = len(encoded["input_ids"])
        account.lengths[length] += 1
        if length > self.max_length:
            account.touched(place)
            if self.long_rows == "drop":
                account.too_long_rows += 1
                return None
            account.cut_rows += 1
            account.cut_tokens += length - self.max_length
            encoded = self.cut(encoded)
        if not encoded["input_ids"] or not learned_tokens(encoded):
            account.touched(place)
            account.unlearned_rows += 1
            return None
        return encoded

    def cut(self, encoded: Encoded) -> Encoded:
        """The row with at most `max_length` tokens."""
        cut: Encoded = {}
        for name, value in encoded.items():
            cut[name] = value[: self.max_length] if isinstance(value, list) else value
        return cut

    def _count(self, encoded: Encoded) -> None:
        self.account.kept += 1
        self.account.tokens += len(encoded["input_ids"])
        self.account.supervised_tokens += learned_tokens(encoded)


def _turns(messages: Sequence[dict[str, Any]]) -> int:
    """How many of the messages are the assistant's."""
    return sum(message["role"] in LEARNED_ROLES for message in messages)


def _remarkable(messages: Sequence[dict[str, Any]]) -> list[str]:
    """What a conversation has that may be a mistake: empty answers, and roles with unknown names."""
    found = []
    for message in messages:
        role = message["role"]
        if role not in KNOWN_ROLES:
            found.append(f"a message with the unknown role {role!r}, which is not learned")
        elif role in LEARNED_ROLES and message.keys() <= {"role", "content"}:
            content = message.get("content")
            if content is None or (isinstance(content, str) and not content.strip()):
                found.append(EMPTY)
    return list(dict.fromkeys(found))


def learned_tokens(encoded: Encoded) -> int:
    """The number of learned tokens, except the first of the sequence, which is never predicted; 1 for a class."""
    labels = encoded["labels"]
    if not isinstance(labels, list):
        return 1
    return sum(label != IGNORED for label in labels[1:])


def _inside(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool | None]:
    """For each token, whether it is inside a span; None if it crosses the edge of one. Both are in order."""
    inside: list[bool | None] = []
    following = 0
    for start, end in offsets:
        while following < len(spans) and spans[following][1] <= start:
            following += 1
        if following == len(spans):
            inside.append(False)
            continue
        low, high = spans[following]
        if low <= start and end <= high and start < end:
            inside.append(True)
        else:
            crosses = start < low < end or start < high < end
            inside.append(None if crosses else False)
    return inside
