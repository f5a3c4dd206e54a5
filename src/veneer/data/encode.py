"""Examples as token ids and labels, within the length limit, and an account of what that cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from .chat import ASSISTANT, Span, Template
from .shapes import Example

IGNORED = -100
"""The label of a token that is not learned."""
Encoded = dict[str, Any]
"""input_ids and labels, lists of one length; or input_ids and labels, the number of a class."""


@dataclass
class Account:
    """What became of the rows."""

    rows: int = 0
    """Rows read."""
    kept: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    too_long_rows: int = 0
    """Dropped for their length."""
    unlearned_rows: int = 0
    """Dropped because no token of them is learned (what was cut held the answer, or there is none)."""
    open_rows: int = 0
    """The template ends the last answer with no token, so the tokenizer's end of text was put there."""
    lengths: Counter[int] = field(default_factory=Counter)
    """How many rows have which length, before cutting."""
    examples: list[str] = field(default_factory=list)
    """Places of the first rows that were cut or dropped."""

    def touched(self, place: str) -> None:
        if len(self.examples) < 5:
            self.examples.append(place)

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lengths"} | {
            "lengths": {str(length): self.lengths[length] for length in sorted(self.lengths)}
        }


class Encoder:
    """Turns examples into tokens.

    Args:
        template_file: a chat template to use in place of the tokenizer's.
        loss_on: "assistant" or "all".
        labels: the classes in order, where rows have one.
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
        self.tokenizer, self.max_length, self.long_rows, self.loss_on = tokenizer, max_length, long_rows, loss_on
        own = Path(template_file).read_text(encoding="utf-8") if template_file else tokenizer.chat_template
        self.template = Template(tokenizer, own) if own else None
        self.numbers = None if labels is None else {name: number for number, name in enumerate(labels)}
        self.account = Account()

    def encode(self, examples: Iterable[Example]) -> Iterator[Encoded]:
        """The rows that something can be learned from."""
        for example in examples:
            self.account.rows += 1
            encoded = self._limited(example.place, self.tokens(example))
            if encoded is not None:
                yield self._counted(encoded) | example.facts

    def tokens(self, example: Example) -> Encoded:
        """One example, uncut."""
        if example.label is not None:
            return self._classified(example)
        if example.text is not None:
            return self._plain(example.text)
        messages = example.messages or []
        if self.template is None:
            return self._untemplated(example.place, messages)
        rendered = self.template.render(example.place, messages, example.tools)
        text, spans = rendered.text, rendered.spans
        if not rendered.ended:
            self.account.open_rows += 1
            end = self.tokenizer.eos_token or ""
            text, spans = text[: spans[-1][1]] + end, [*spans[:-1], (spans[-1][0], spans[-1][1] + len(end))]
        return self._masked(text, spans)

    def asked(self, example: Example) -> tuple[list[int], str]:
        """The tokens that the last answer of a conversation follows, and that answer.

        Raises:
            DataError: the row has no question and answer.
        """
        *before, last = example.messages or [{}]
        answer = last.get("content")
        if not before or last["role"] not in ASSISTANT or not isinstance(answer, str):
            raise DataError(f"{example.place} has no question with an answer in words, which generating needs")
        if self.template is None:
            text = self._question(example.place, example.messages or [])
        else:
            text = self.template.prompt(example.place, before, example.tools)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids), answer

    def _untemplated(self, place: str, messages: list[dict[str, Any]]) -> Encoded:
        before = self._question(place, messages)
        text = before + messages[1]["content"] + (self.tokenizer.eos_token or "")
        return self._masked(text, [(len(before), len(text))])

    def _question(self, place: str, messages: list[dict[str, Any]]) -> str:
        """What goes before an answer for a model without a chat template: the question, on a line of its own."""
        if [m["role"] for m in messages] != ["user", "assistant"]:
            raise ConfigError(f"{place} is a conversation, but the tokenizer has no chat template; give chat_template")
        question, answer = (m["content"] for m in messages)
        start = self.tokenizer.bos_token if self._adds_bos() else ""
        joint = "" if question[-1:].isspace() or answer[:1].isspace() else "\n"
        return (start or "") + question + joint

    def _adds_bos(self) -> bool:
        return (
            self.tokenizer.bos_token_id is not None and self.tokenizer("a").input_ids[0] == self.tokenizer.bos_token_id
        )

    def _plain(self, text: str) -> Encoded:
        ids = list(self.tokenizer(text).input_ids)
        end = self.tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        return {"input_ids": ids, "labels": list(ids)}

    def _classified(self, example: Example) -> Encoded:
        assert self.numbers is not None
        if example.label not in self.numbers:
            raise DataError(f"{example.place}: the label {example.label!r} is not one of {', '.join(self.numbers)}")
        return {"input_ids": list(self.tokenizer(example.text).input_ids), "labels": self.numbers[example.label]}

    def _masked(self, text: str, spans: list[Span]) -> Encoded:
        """Tokens of a text; those inside the spans are learned.

        A token across the start of a span would be learned with bytes that are not the assistant's, and could not be
        generated after the prompt; such a text is tokenised piece by piece.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast)
        ids = list(encoded.input_ids)
        if self.tokenizer.is_fast:
            where = [_place(offset, spans) for offset in encoded.offset_mapping]
        if not self.tokenizer.is_fast or None in where:
            ids, where = self._by_pieces(text, spans)
        learned = [bool(inside) or self.loss_on == "all" for inside in where]
        return {"input_ids": ids, "labels": [t if own else IGNORED for t, own in zip(ids, learned, strict=True)]}

    def _by_pieces(self, text: str, spans: list[Span]) -> tuple[list[int], list[bool | None]]:
        ids: list[int] = []
        where: list[bool | None] = []
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        for number, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
            piece = list(self.tokenizer(text[start:end], add_special_tokens=False).input_ids)
            ids += piece
            where += [number % 2 == 1] * len(piece)
        return ids, where

    def _limited(self, place: str, encoded: Encoded) -> Encoded | None:
        """The row within the limit, or None; accounts for what was done."""
        account, length = self.account, len(encoded["input_ids"])
        account.lengths[length] += 1
        if length > self.max_length:
            account.touched(place)
            if self.long_rows == "drop":
                account.too_long_rows += 1
                return None
            account.cut_rows += 1
            account.cut_tokens += length - self.max_length
            encoded = {name: v[: self.max_length] if isinstance(v, list) else v for name, v in encoded.items()}
        if not encoded["input_ids"] or not learned_tokens(encoded):
            account.touched(place)
            account.unlearned_rows += 1
            return None
        return encoded

    def _counted(self, encoded: Encoded) -> Encoded:
        self.account.kept += 1
        self.account.tokens += len(encoded["input_ids"])
        self.account.supervised_tokens += learned_tokens(encoded)
        return encoded


def learned_tokens(encoded: Encoded) -> int:
    """Tokens that are predicted and learned; the first of a sequence is not predicted. A class counts as one."""
    labels = encoded["labels"]
    return sum(label != IGNORED for label in labels[1:]) if isinstance(labels, list) else 1


def _place(offset: Span, spans: list[Span]) -> bool | None:
    """Whether a token is inside a span; None when it stands across an edge."""
    start, end = offset
    for low, high in spans:
        if low <= start and end <= high and start < end:
            return True
        if start < low < end or start < high < end:
            return None
    return False
