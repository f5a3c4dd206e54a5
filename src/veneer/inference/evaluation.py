"""A base model and its adapters on a file: loss, answers, classes, side by side.

loaded = load(["my-adapter"])
found = evaluate(loaded, read(loaded, [Source(path="test.jsonl")]), extract="####")
found.results["my-adapter"]["loss"], found.results["base"]["loss"]
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.config import TaskType
from ..data.collate import Collator
from ..data.encode import Account, Encoded, Encoder
from ..data.prepare import examples
from ..data.shapes import Example
from ..data.sources import Source
from ..errors import ConfigError, DataError
from ..model.loading import Loaded, pad_of
from .generation import Sampling, Writer

MAJORITY = "most frequent class"
"""What a classifier is held against whose base has no classes of its own."""
TASKS = ("auto", "text", "classification")
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many rows are done, and of how many."""


@dataclass
class Evaluation:
    """What was found."""

    rows: int
    """Rows judged."""
    account: Account
    """What became of the rows of the data."""
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    """Numbers by name of the model and then of the measure; shares lie between 0 and 1."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """Each row that was answered or classified: its place, what is right, and what each model says."""

    def as_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "results": self.results, "data": self.account.as_dict()}


def task_of(sources: Sequence[Source], task: str = "auto") -> TaskType:
    """What a base model is to be loaded for, by the first row of the data.

    Raises:
        ConfigError: there is no such task.
    """
    if task not in TASKS:
        raise ConfigError(f"task = {task!r} must be {', '.join(TASKS)}")
    first = next(examples(sources[0], task))
    return TaskType.CAUSAL_LM if first.label is None else TaskType.SEQ_CLS


def read(loaded: Loaded, sources: Sequence[Source], *, task: str = "auto", limit: int | None = None) -> list[Example]:
    """The rows of the data, or the first `limit` of each source.

    Raises:
        DataError: it cannot be read, or is not of the kind that the model was trained for.
    """
    classifies = loaded.task is TaskType.SEQ_CLS
    if classifies and task == "text":
        raise ConfigError("task = text: the model is a classifier, and cannot be judged on plain text")
    facts = tuple(sorted(loaded.facts))
    wanted = "classification" if classifies else task
    found = [e for source in sources for e in islice(examples(source, wanted, facts), limit)]
    labelled = next((e for e in found if e.label is not None), None)
    if labelled is not None and not classifies:
        raise DataError(
            f"{labelled.place} has a text and its label, which {', '.join(loaded.adapters) or 'the model'} does not "
            "classify: it writes text. Give data with prompt and completion, or --task text to judge the texts alone"
        )
    return found


def evaluate(
    loaded: Loaded,
    rows: Sequence[Example],
    *,
    exact: bool = False,
    extract: str | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 8,
    max_length: int = 1024,
    loss_on: str = "assistant",
    template_file: str | Path | None = None,
    progress: Progress = lambda what, done, of: None,
) -> Evaluation:
    """Judge the base and each adapter.

    Args:
        exact: write answers, and compare them as a whole.
        extract: write answers, and compare what this regular expression finds in them (`judging.Extract`).
        sampling: how answers are written; greedily unless said otherwise.
        batch_size: rows of a forward pass.
        max_length: longest row in tokens where the loss is taken; longer ones are cut, and accounted for.
        loss_on: which tokens count, "assistant" or "all".
        template_file: a chat template to use in place of the tokenizer's.

    Raises:
        DataError: rows that cannot be judged; names the first.
    """
    if not (loaded.adapters or loaded.base_is_whole):
        raise ConfigError(f"{loaded.base!r} has no trained classifier; judge an adapter that brings one")
    if loss_on not in ("assistant", "all"):
        raise ConfigError(f"loss_on = {loss_on!r} must be assistant or all")
    classes = _classes(loaded, rows) if loaded.task is TaskType.SEQ_CLS else None
    if classes is not None and (exact or extract is not None):
        raise ConfigError("a classifier writes no answers; leave exact and extract out")
    encoder = Encoder(loaded.tokenizer, max_length, loss_on=loss_on, template_file=template_file, labels=classes)
    pairs = [(row, encoded) for row in rows for encoded in encoder.encode([row])]
    if not pairs:
        raise DataError(f"none of the {len(rows)} rows has a token to judge; is there an answer, and room for it?")
    run = _Run(loaded, batch_size, progress, Evaluation(len(pairs), encoder.account))
    if classes is not None:
        run.classify(pairs, classes)
        return run.found
    judges = _judges(exact, extract)
    asked = [(row, *encoder.asked(row)) for row in rows] if judges else []
    writer = Writer(loaded, sampling or Sampling(), template_file=template_file) if judges else None
    _check_asked(asked, judges, writer)
    run.losses([encoded for _, encoded in pairs])
    if writer is not None:
        run.answer(writer, asked, judges)
    return run.found


Asked = tuple[Example, list[int], str]
"""A row, the tokens of its prompt, and the answer that is right."""
Judges = dict[str, Callable[[str], str | None]]
"""What of an answer is compared, by the name of the measure."""


@dataclass
class _Run:
    """One evaluation under way."""

    loaded: Loaded
    batch_size: int
    progress: Progress
    found: Evaluation

    def losses(self, encoded: list[Encoded]) -> None:
        """Loss, perplexity and token accuracy of each model over all judged tokens."""
        for name in self.loaded.names:
            total, count, hits, _ = self._sums(name, encoded).sum(0).tolist()
            loss = total / count
            shown = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": hits / count}
            self.found.results[name] = shown

    def classify(self, pairs: list[tuple[Example, Encoded]], classes: list[str]) -> None:
        """Loss, accuracy and macro F1 of each classifier; of one without classes of its own, of the commonest class."""
        encoded = [own for _, own in pairs]
        wanted = [own["labels"] for own in encoded]
        said: dict[str, list[int]] = {}
        if not self.loaded.base_is_whole:
            said[MAJORITY] = [Counter(sorted(wanted)).most_common(1)[0][0]] * len(wanted)
            self.found.results[MAJORITY] = {}
        for name in self.loaded.names if self.loaded.base_is_whole else self.loaded.adapters:
            sums = self._sums(name, encoded)
            said[name] = sums[:, 3].long().tolist()
            self.found.results[name] = {"loss": float(sums[:, 0].mean())}
        for name, predicted in said.items():
            hits = sum(p == w for p, w in zip(predicted, wanted, strict=True))
            self.found.results[name] |= {"accuracy": hits / len(wanted), "macro_f1": macro_f1(predicted, wanted)}
        for i, (row, _) in enumerate(pairs):
            answers = {name: classes[predicted[i]] for name, predicted in said.items()}
            self.found.records.append({"place": row.place, "text": row.text, "wanted": row.label, "answers": answers})

    def answer(self, writer: Writer, asked: list[Asked], judges: Judges) -> None:
        """Let each model write answers, and judge them."""
        self.found.records = [
            {"place": row.place, "prompt": writer.tokenizer.decode(ids), "wanted": right, "answers": {}}
            for row, ids, right in asked
        ]
        for name in self.loaded.names:
            hits, unfinished = Counter(dict.fromkeys(judges, 0)), 0
            for i, answer in self._written(writer, name, asked):
                right = asked[i][2]
                verdicts = {measure: same(part(answer.text), part(right) or "") for measure, part in judges.items()}
                self.found.records[i]["answers"][name] = {"text": answer.text, "ended": answer.ended, **verdicts}
                hits.update(measure for measure, is_right in verdicts.items() if is_right)
                unfinished += not answer.ended
            shares = {measure: count / len(asked) for measure, count in hits.items()}
            self.found.results[name] |= shares | {"unfinished": unfinished / len(asked)}

    def _written(self, writer: Writer, name: str, asked: list[Asked]) -> Iterator[tuple[int, Any]]:
        """(row, answer), batch by batch."""
        done = 0
        for batch in _batches([len(ids) for _, ids, _ in asked], self.batch_size):
            facts = {key: torch.tensor([asked[i][0].facts[key] for i in batch]) for key in asked[batch[0]][0].facts}
            yield from zip(batch, writer.write([name], [asked[i][1] for i in batch], facts=facts), strict=True)
            done += len(batch)
            self.progress(f"{name} writes", done, len(asked))

    @torch.no_grad()
    def _sums(self, name: str, encoded: list[Encoded]) -> Tensor:
        """(rows, 4): each row's summed loss, judged tokens, hits, and the likeliest class where it has one."""
        from ..data.collate import token_sums

        device, collate = next(self.loaded.model.parameters()).device, Collator(pad_of(self.loaded.tokenizer))
        sums, done = torch.zeros(len(encoded), 4, dtype=torch.float64), 0
        with self.loaded.running(name):
            for batch in _batches([len(row["input_ids"]) for row in encoded], self.batch_size):
                inputs = {key: t.to(device) for key, t in collate([encoded[i] for i in batch]).items()}
                logits = self.loaded.model(**inputs).logits
                sums[batch, :3] = token_sums(logits, inputs["labels"]).double().cpu()
                sums[batch, 3] = logits.argmax(-1).double().cpu() if logits.dim() == 2 else 0.0
                done += len(batch)
                self.progress(name, done, len(encoded))
        return sums


def _batches(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Rows of like length together, the longest first: what does not fit into memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _classes(loaded: Loaded, rows: Sequence[Example]) -> list[str]:
    """The classes in order; where nothing names them, the data must give their numbers."""
    if loaded.labels is not None:
        return loaded.labels
    numbers = [str(i) for i in range(loaded.model.num_labels)]
    other = next((row for row in rows if row.label not in numbers), None)
    if other is not None:
        raise ConfigError(
            f"nothing says which of the model's {len(numbers)} classes is {other.label!r} ({other.place}); give the "
            "names of the classes in the order of training with labels"
        )
    return numbers


def _judges(exact: bool, extract: str | None) -> Judges:
    found: Judges = {"exact_match": lambda text: text} if exact else {}
    return found | ({} if extract is None else {"extracted_match": Extract(extract)})


def _check_asked(asked: list[Asked], judges: Judges, writer: Writer | None) -> None:
    """Raise before anything runs where a right answer cannot be found, or a prompt is too long."""
    for row, ids, right in asked:
        if any(part(right) is None for part in judges.values()):
            raise DataError(f"{row.place}: extract finds nothing in the answer that is right, {shortened(right)}")
        assert writer is not None
        writer.check_room(len(ids), row.place)


def shortened(text: str, most: int = 60) -> str:
    text = repr(text)
    return text if len(text) <= most else text[: most // 2] + "..." + text[-most // 2 :]


PADDING = re.compile(r"^[\s$€£]+|[\s.]+$")


class Extract:
    """Finds an answer in a text: the last match of a pattern.

    Args:
        pattern: a regular expression. Its first group is the answer; without a group, what follows the match on its
            line is ("####" finds the 18 of "#### 18").

    Raises:
        ConfigError: it is no regular expression.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"extract = {pattern!r} is no regular expression: {error}") from None

    def __call__(self, text: str) -> str | None:
        found = list(self.pattern.finditer(text))
        if not found:
            return None
        after = text[found[-1].end() :].partition("\n")[0]
        return (found[-1].group(1) or "" if self.pattern.groups else after).strip()


def same(answer: str | None, wanted: str) -> bool:
    """Whether two answers agree: as numbers (1,000 is 1000.0, and $18. is 18), else word by word."""
    if answer is None:
        return False
    numbers = _number(answer), _number(wanted)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return answer.split() == wanted.split()


def _number(text: str) -> Decimal | None:
    try:
        found = Decimal(PADDING.sub("", text).replace(",", ""))
    except InvalidOperation:
        return None
    return found if found.is_finite() else None


def macro_f1(predicted: list[int], wanted: list[int]) -> float:
    """The mean over classes of F1, the harmonic mean of precision and recall; classes that occur in either count."""
    scores = []
    for label in {*predicted, *wanted}:
        hits = sum(p == w == label for p, w in zip(predicted, wanted, strict=True))
        scores.append(2 * hits / (predicted.count(label) + wanted.count(label)))
    return sum(scores) / len(scores)
