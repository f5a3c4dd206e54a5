"""Rows with two answers to one prompt, a better and a worse one.

    prompt, chosen, rejected      each a text or a list of messages; optional column `tools`
    chosen, rejected              two conversations that begin with the same messages

Only the answers are learned from: of a conversation, the messages after the prompt. A pair says nothing if an answer is
empty, or if both are equal, also after they are cut; such pairs are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError
from .encode import EMPTY as EMPTY_ANSWER
from .encode import FIRST, Account, Encoded, Encoder, Seen, learned_tokens
from .shapes import LEARNED_ROLES, Example, integers, messages_in, short, slips
from .sources import Source, rows

SAME = "a chosen answer that equals the rejected one: left out"
SAME_WHEN_CUT = "answers that are equal once they are cut to max_length: left out"
EMPTY = "an empty answer: left out"
COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers, as messages."""

    place: str
    prompt: list[dict[str, Any]]
    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    tools: list[Any] | None = None
    facts: dict[str, int] = field(default_factory=dict)
    """Integers that the method reads per row."""

    def example(self, answer: list[dict[str, Any]]) -> Example:
        """The conversation that ends with one of the answers, which alone is learned."""
        return Example(self.place, [*self.prompt, *answer], self.tools, learned_from=len(self.prompt), facts=self.facts)


def preferences(source: Source, facts: tuple[str, ...] = ()) -> Iterator[Pair]:
    """Yield the rows of a source as pairs.

    Args:
        facts: names of integer columns that the method reads, if the rows have them.

    Raises:
        DataError: a row is no pair, or the source has no rows.
    """
    count = 0
    for place, row in rows(source):
        count += 1
        yield understand(place, row, facts)
    if not count:
        raise DataError(f"{source.path!r} holds no rows")


def understand(place: str, row: Mapping[str, Any], facts: tuple[str, ...] = ()) -> Pair:
    """Read a row with a chosen and a rejected answer.

    Raises:
        DataError: a column is missing or of the wrong type, or the conversations do not have a prompt in common.
    """
    missing = [column for column in COLUMNS[1:] if column not in row]
    if missing:
        present = ", ".join(row) or "(none)"
        raise DataError(
            f"{place} has the columns {present}{slips(row, COLUMNS)}; a preference needs chosen and rejected, and "
            "prompt if they are texts. Name them with columns (--column OURS=THEIRS)"
        )
    chosen = _said(place, row, "chosen", "assistant")
    rejected = _said(place, row, "rejected", "assistant")
    if row.get("prompt") is not None:
        prompt = _said(place, row, "prompt", "user")
        chosen, rejected = (_without(prompt, answer) for answer in (chosen, rejected))
    else:
        prompt = _common(place, row, chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for column, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[-1]["role"] not in LEARNED_ROLES:
            raise DataError(f"{place}: {column} must end with a message of the assistant after the prompt")
    tools = row.get("tools")
    return Pair(place, prompt, chosen, rejected, tools, integers(place, row, facts))


def _said(place: str, row: Mapping[str, Any], column: str, role: str) -> list[dict[str, Any]]:
    """The messages of a column; a text is one message of the given role."""
    value = row[column]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return messages_in(place, row, column)
    raise DataError(f"{place}: {column} must be text or a list of messages, not {short(value)}")


def _without(prompt: list[dict[str, Any]], answer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of an answer, without the prompt that some datasets repeat in it."""
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def _common(
    place: str, row: Mapping[str, Any], chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The messages that two conversations begin with, up to the first that the assistant answers differently."""
    if not (isinstance(row["chosen"], list) and isinstance(row["rejected"], list)):
        raise DataError(f"{place}: chosen and rejected are texts without a prompt; give it (--column prompt=THEIRS)")
    shared = 0
    for a, b in zip(chosen[:-1], rejected[:-1], strict=False):
        if a != b:
            break
        shared += 1
    if shared == 0:
        raise DataError(f"{place}: the conversations chosen and rejected do not begin with the same message")
    if not chosen[shared]["role"] == rejected[shared]["role"] in LEARNED_ROLES:
        raise DataError(f"{place}: chosen and rejected differ in message {shared + 1}, which is not the assistant's")
    return chosen[:shared]


class PairEncoder:
    """Turns pairs into rows {chosen, rejected}, whose answers are encoded by an `Encoder`.

    The account counts pairs; its tokens and lengths are those of both answers.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.account = Account()
        self.first: list[Seen] = []
        """Both answers of the first pairs, before and after the length limit."""

    def encode(self, pairs: Iterable[Pair]) -> Iterator[Encoded]:
        """Yield the pairs that say something, and count all of them."""
        for pair in pairs:
            chosen, rejected = (answer.kept for answer in self.seen(pair))
            if chosen is not None and rejected is not None:
                yield {"chosen": chosen | pair.facts, "rejected": rejected | pair.facts}

    def seen(self, pair: Pair) -> list[Seen]:
        """Encode both answers of a pair, apply the length limit, and count the pair."""
        self.account.rows += 1
        examples = [pair.example(pair.chosen), pair.example(pair.rejected)]
        self.encoder.account = Account()  # of this pair: what is noticed in both answers counts once
        whole = [self.encoder.tokens(example) for example in examples]
        self._take_notes(pair.place, self.encoder.account)
        kept = self._kept(pair, whole)
        rows = []
        for number, name in enumerate(COLUMNS[1:]):
            rows.append(Seen(examples[number], whole[number], kept[number] if kept else None, name))
        if len(self.first) < FIRST:
            self.first += rows
        return rows

    def _take_notes(self, place: str, noticed: Account) -> None:
        """Count what was noticed in a pair's answers; an empty answer has a note of its own."""
        for what in noticed.notes.keys() - {EMPTY_ANSWER}:
            self.account.noticed(what, place)
        self.account.open_rows += min(1, noticed.open_rows)

    def _kept(self, pair: Pair, answers: list[Encoded]) -> list[Encoded] | None:
        """Both answers within the limit; None if the pair is left out."""
        reason = _says_nothing(pair)
        if reason is not None:
            self.account.noticed(reason, pair.place)
            return None
        if not self._fits(pair.place, answers):
            return None
        chosen, rejected = (self.encoder.cut(answer) for answer in answers)
        if chosen["input_ids"] == rejected["input_ids"]:
            self.account.noticed(SAME_WHEN_CUT, pair.place)
            return None
        if not (learned_tokens(chosen) and learned_tokens(rejected)):
            self.account.touched(pair.place)
            self.account.unlearned_rows += 1
            return None
        self.account.kept += 1
        for answer in (chosen, rejected):
            self.account.tokens += len(answer["input_ids"])
            self.account.supervised_tokens += learned_tokens(answer)
        return [chosen, rejected]

    def _fits(self, place: str, answers: list[Encoded]) -> bool:
        """Count the answers' lengths; False if the pair is dropped because one of them is too long."""
        account = self.account
        lengths = [len(answer["input_ids"]) for answer in answers]
        account.lengths.update(lengths)
        excess = sum(max(0, length - self.encoder.max_length) for length in lengths)
        if not excess:
            return True
        account.touched(place)
        if self.encoder.long_rows == "drop":
            account.too_long_rows += 1
            return False
        account.cut_rows += 1
        account.cut_tokens += excess
        return True


def _says_nothing(pair: Pair) -> str | None:
    """Why a pair cannot be learned from, as a note of the account; None if it can."""
    if _is_empty(pair.chosen) or _is_empty(pair.rejected):
        return EMPTY
    return SAME if pair.chosen == pair.rejected else None


def _is_empty(answer: list[dict[str, Any]]) -> bool:
    """Whether the assistant says nothing in an answer, and calls no tool."""
    for message in answer:
        content = message.get("content")
        if message["role"] in LEARNED_ROLES and (message.get("tool_calls") or (content and str(content).strip())):
            return False
    return True


def plain(row: Encoded) -> Encoded:
    """The row that stands for a pair where one answer is wanted: the chosen one. Any other row is returned as it is."""
    return row.get("chosen", row)  # type: ignore[no-any-return]


def tokens_of(row: Encoded) -> int:
    """The number of tokens of a row, or of both answers of a pair with their prompts."""
    answers = [row[name] for name in ("chosen", "rejected") if name in row]
    return sum(len(answer["input_ids"]) for answer in answers or [row])
