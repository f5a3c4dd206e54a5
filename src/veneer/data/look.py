"""Look at data as training will see it: the first rows token by token, lengths, duplicates, and rows that are odd.

Rows are read and encoded one at a time, by the functions that training uses. What is kept of a row is its length and
its hash, so memory does not grow with the length of rows, and a limit bounds the number of rows.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from ..errors import DataError
from . import preferences
from .encode import IGNORED, Account, Encoded, Encoder, Note, Seen
from .oddities import oddities
from .pieces import row_facts
from .preferences import PairEncoder
from .prepare import Request, check_learned, encoder_of, is_classification, labels_among, split
from .shapes import Example, shape_of, understand
from .sources import Source, rows

Step = Callable[[int], None]
"""Called with the number of rows read so far."""


@dataclass
class Part:
    """What was found in the training data, or in the evaluation data."""

    account: Account = field(default_factory=Account)
    classes: Counter[str] = field(default_factory=Counter)
    """Rows of each class, for classification."""
    hashes: list[list[bytes]] = field(default_factory=list)
    """For each source, the hashes of the rows that are kept."""
    places: dict[bytes, str] = field(default_factory=dict)
    """The first place of each hash."""
    answers: dict[bytes, bytes] = field(default_factory=dict)
    """For the hash of what is given in a row, that of what is first learned from it."""
    duplicates: Note = field(default_factory=Note)
    """Rows that repeat an earlier one."""
    odd: dict[str, Note] = field(default_factory=dict)
    """Rows that may not be what was meant, by what they have."""
    refused: dict[str, Note] = field(default_factory=dict)
    """Rows that would end a training run, by the error."""
    is_whole: bool = True
    """False if the limit left rows unread."""


@dataclass
class Look:
    """Data as a training run would see it."""

    train: Part
    evaluation: Part | None
    """None without evaluation data; held-out rows (`eval_split`) are described with the training data."""
    held_out: int
    """Rows of the training data that `eval_split` holds out."""
    leaked: int
    """Evaluation rows that are also trained on."""
    leaked_place: str | None
    """The place of the first of them."""
    labels: list[str] | None
    rows: list[dict[str, Any]]
    """The rows that are shown, as `pieces.row_facts` describes them."""
    max_length: int

    def as_dict(self) -> dict[str, Any]:
        evaluation = None if self.evaluation is None else part_facts(self.evaluation)
        return {
            "max_length": self.max_length,
            "labels": self.labels,
            "train": part_facts(self.train),
            "evaluation": evaluation,
            "held_out": self.held_out,
            "also_in_training": self.leaked,
            "first_also_in_training": self.leaked_place,
            "rows": self.rows,
        }


def look(
    recipe: Request,
    tokenizer: Any,
    facts: tuple[str, ...] = (),
    *,
    shown: int = 3,
    numbers: Collection[int] = (),
    most: int = 100_000,
    step: Step = lambda count: None,
) -> Look:
    """Read and encode the data of a recipe as training does, and describe it.

    Args:
        facts: integer columns that the method reads per row.
        shown: the number of rows to show, from the beginning.
        numbers: numbers of the rows to show instead, as the data's places have them: lines of a file.
        most: rows to read, of training and of evaluation data.
        step: called after each row.

    Raises:
        DataError: the data cannot be read. A single row that training would refuse is listed instead.
    """
    labels = _labels(recipe, most)
    encoder = encoder_of(recipe, tokenizer, labels)
    chosen: list[list[Seen]] = []

    def choose(answers: list[Seen]) -> None:
        number = int(answers[0].example.place.rpartition(":")[2])
        if number in numbers or (not numbers and len(chosen) < shown):
            chosen.append(answers)

    train = _read(recipe.data, recipe, encoder, tokenizer, facts, most, choose, step)
    evaluation = None
    if recipe.eval_data:
        eval_encoder = encoder_of(recipe, tokenizer, labels)
        evaluation = _read(recipe.eval_data, recipe, eval_encoder, tokenizer, facts, most, lambda answers: None, step)
    trained, evaluated = _sides(recipe, train, evaluation)
    also_trained = [one for one in evaluated if one in trained]
    places = (evaluation or train).places
    return Look(
        train,
        evaluation,
        held_out=0 if evaluation else len(evaluated),
        leaked=len(also_trained),
        leaked_place=places[also_trained[0]] if also_trained else None,
        labels=labels,
        rows=[row_facts(row, tokenizer, labels) for row in chain.from_iterable(chosen)],
        max_length=recipe.max_length,
    )


def _examples(sources: Sequence[Source], recipe: Request, facts: tuple[str, ...], part: Part) -> Iterator[Any]:
    """(number of its source, example or pair) for each row; one that cannot be understood is noted as refused."""
    for number, source in enumerate(sources):
        shape = None
        for place, row in rows(source):
            try:
                if recipe.reads_pairs:
                    shape = "pair"
                    yield number, preferences.understand(place, row, facts)
                    continue
                shape = shape or shape_of(place, row, recipe.task)
                yield number, understand(place, row, shape, facts)
            except DataError as error:
                part.account.rows += 1
                _refuse(part, place, error)
        if shape is None:
            raise DataError(f"{source.path!r} holds no rows")


def _labels(recipe: Request, most: int) -> list[str] | None:
    """The classes of the data; the first row of each class is enough to find them."""
    if not is_classification(recipe):
        return None
    if recipe.labels:
        return recipe.labels
    first: dict[str | None, Example] = {}
    for sources in (recipe.data, recipe.eval_data):
        for _, example in islice(_examples(sources, recipe, (), Part()), most):
            first.setdefault(example.label, example)
    return labels_among(recipe, list(first.values()))


def _read(
    sources: Sequence[Source],
    recipe: Request,
    encoder: Encoder | PairEncoder,
    tokenizer: Any,
    facts: tuple[str, ...],
    most: int,
    choose: Callable[[list[Seen]], None],
    step: Step,
) -> Part:
    """Describe the rows of some sources."""
    part = Part(encoder.account, hashes=[[] for _ in sources])
    for source, example in _examples(sources, recipe, facts, part):
        if part.account.rows >= most:
            part.is_whole = False
            break
        try:
            answers = encoder.seen(example)
        except DataError as error:
            _refuse(part, example.place, error)
            continue
        choose(answers)
        _describe(part, source, answers, tokenizer, recipe.max_length)
        step(part.account.rows)
    for what, note in part.account.notes.items():
        part.odd.setdefault(what, note)
    if not part.refused:
        _check(part)
    return part


def _check(part: Part) -> None:
    """Note the reason why training would refuse the rows together, as when all of them are dropped."""
    try:
        check_learned(part.account, "the data")
    except DataError as error:
        part.refused[str(error)] = Note(part.account.rows)


def _refuse(part: Part, place: str, error: DataError) -> None:
    reason = str(error).removeprefix(place).lstrip(": ")
    part.refused.setdefault(reason, Note()).add(place)


def _describe(part: Part, source: int, answers: list[Seen], tokenizer: Any, max_length: int) -> None:
    """Note a row's class, its hash, and what is odd about it or about one of its answers."""
    place = answers[0].example.place
    odd: dict[str, None] = {}
    for answer in answers:
        odd |= dict.fromkeys(oddities(answer, tokenizer))
    for what in odd:
        part.odd.setdefault(what, Note()).add(place)
    kept = [answer.kept for answer in answers if answer.kept is not None]
    if not kept:
        _describe_dropped(part, answers, max_length)
        return
    label = answers[0].example.label
    if label is not None:
        part.classes[label] += 1
    given, whole = _hashes(kept)
    part.hashes[source].append(whole)
    if part.places.setdefault(whole, place) != place:
        part.duplicates.add(place)
    if len(kept) == 1 and part.answers.setdefault(given, whole) != whole:
        part.odd.setdefault("the question of another row, but another answer", Note()).add(place)


def _describe_dropped(part: Part, answers: list[Seen], max_length: int) -> None:
    """Note why a row is dropped, unless its encoding has noted that."""
    place = answers[0].example.place
    if any(_is_unlearned(answer.whole) for answer in answers):
        part.odd.setdefault("no token to learn and is dropped", Note()).add(place)
    elif any(len(answer.whole["input_ids"]) > max_length for answer in answers):
        part.odd.setdefault("more tokens than max_length and is dropped", Note()).add(place)


def _is_unlearned(whole: Encoded) -> bool:
    labels = whole["labels"]
    return isinstance(labels, list) and all(label == IGNORED for label in labels[1:])


def _hashes(answers: list[Encoded]) -> tuple[bytes, bytes]:
    """Hashes of what is given in a row and of the whole row, with all its answers; the same if nothing is given."""
    ids = answers[0]["input_ids"]
    labels = answers[0]["labels"]
    whole = _hash([[answer["input_ids"], answer["labels"]] for answer in answers])
    if not isinstance(labels, list):
        return _hash(ids), whole
    given = [token for token, label in zip(ids, labels, strict=True) if label == IGNORED]
    return (_hash(given) if given else whole), whole


def _hash(content: Any) -> bytes:
    return hashlib.blake2b(repr(content).encode(), digest_size=12).digest()


def _sides(recipe: Request, train: Part, evaluation: Part | None) -> tuple[set[bytes], list[bytes]]:
    """(hashes of the rows to train on, hashes of the rows to evaluate on), with the split of training."""
    sources = train.hashes
    if evaluation is not None:
        evaluated = list(chain.from_iterable(evaluation.hashes))
    elif recipe.eval_split is not None:
        sources, evaluated = split(sources, recipe.eval_split, random.Random(recipe.seed))
    else:
        evaluated = []
    return set(chain.from_iterable(sources)), evaluated


# Facts for JSON, the terminal and the page


def part_facts(part: Part) -> dict[str, Any]:
    """Counts, lengths in tokens, duplicates and odd rows of one part of the data."""
    account = part.account
    odd = {what: vars(note) for what, note in part.odd.items()}
    refused = {error: vars(note) for error, note in part.refused.items()}
    return {
        "rows": account.rows,
        "is_whole": part.is_whole,
        "kept": account.kept,
        "tokens": account.tokens,
        "learned_tokens": account.supervised_tokens,
        "lengths": lengths(account.lengths),
        "cut_rows": account.cut_rows,
        "cut_tokens": account.cut_tokens,
        "too_long_rows": account.too_long_rows,
        "unlearned_rows": account.unlearned_rows,
        "duplicates": vars(part.duplicates),
        "classes": dict(part.classes.most_common()),
        "odd": odd,
        "refused": refused,
        "histogram": {str(length): account.lengths[length] for length in sorted(account.lengths)},
    }


def lengths(counts: Counter[int]) -> dict[str, int] | None:
    """The shortest length, the median, the 95th percentile and the longest; None if there are no rows."""
    total = counts.total()
    if not total:
        return None
    wanted = {"min": 1, "median": -(-total // 2), "p95": -(-95 * total // 100), "max": total}
    found = {}
    for name, rank in wanted.items():
        seen = 0
        for length in sorted(counts):
            seen += counts[length]
            if seen >= rank:
                found[name] = length
                break
    return found
