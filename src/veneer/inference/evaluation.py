"""Evaluate a base model and its adapters on data: by loss, by written answers, or by predicted classes.

loaded = load(["my-adapter"])
evaluation = evaluate(loaded, read(loaded, [Source(path="test.jsonl")]), extract="####")
evaluation.results["my-adapter"]["loss"], evaluation.results["base"]["loss"]
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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.config import TaskType
from ..data.collate import Collator, token_sums
from ..data.encode import Account, Encoded, Encoder
from ..data.prepare import examples
from ..data.shapes import Example
from ..data.sources import Source
from ..errors import ConfigError, DataError
from ..model.loading import Loaded, pad_of
from ..upstream.models import positions_of
from .generation import Answer, Sampling, Writer

MAJORITY = "most frequent class"
"""Name of the baseline that replaces a base model without a trained classifier."""
TASKS = ("auto", "text", "classification")
Progress = Callable[[str, int, int], None]
"""A callback that receives a description, the number of rows done, and the number of all rows."""


@dataclass
class Evaluation:
    """The results of an evaluation."""

    rows: int
    """Number of rows judged."""
    account: Account
    """Counts of the rows read, kept, cut and dropped."""
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    """Scores by the name of the model and then of the measure; shares are between 0 and 1."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """One record per answered or classified row: its place, the expected answer, and the answer of each model."""

    def as_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "results": self.results, "data": self.account.as_dict()}


def task_of(sources: Sequence[Source], task: str = "auto") -> TaskType:
    """The task to load the base model for, determined by the first row of the data.

    Raises:
        ConfigError: `task` is unknown.
    """
    if task not in TASKS:
        raise ConfigError(f"task = {task!r} must be {', '.join(TASKS)}")
    first = next(examples(sources[0], task))
    if first.label is None:
        return TaskType.CAUSAL_LM
    return TaskType.SEQ_CLS


def read(loaded: Loaded, sources: Sequence[Source], *, task: str = "auto", limit: int | None = None) -> list[Example]:
    """The rows of the data, or the first `limit` rows of each source.

    Raises:
        DataError: the data cannot be read, or does not fit the task of the model.
    """
    classifies = loaded.task is TaskType.SEQ_CLS
    if classifies and task == "text":
        raise ConfigError("task = text: the model is a classifier, which cannot be evaluated on plain text")
    facts = tuple(sorted(loaded.facts))
    if classifies:
        task = "classification"
    rows: list[Example] = []
    for source in sources:
        rows += islice(examples(source, task, facts), limit)
    if classifies:
        return rows
    labelled = next((row for row in rows if row.label is not None), None)
    if labelled is not None:
        raise DataError(
            f"{labelled.place} has a text and a label, but {', '.join(loaded.adapters) or 'the model'} writes text and "
            "does not classify. Give data with prompt and completion, or set task to text to ignore the labels"
        )
    return rows


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
    """Evaluate the base model and each adapter.

    Args:
        exact: write answers, and compare them as a whole.
        extract: write answers, and compare what this regular expression finds in them (see `Extract`).
        sampling: how answers are written; greedily by default.
        batch_size: rows per forward pass.
        max_length: maximum length of a row in tokens, for the loss; longer rows are cut and counted.
        loss_on: which tokens the loss is computed on, "assistant" or "all".
        template_file: a chat template to use instead of the tokenizer's.
        progress: called after each batch.

    Raises:
        DataError: a row cannot be evaluated; the message names the first.
    """
    if not (loaded.adapters or loaded.base_is_whole):
        raise ConfigError(f"{loaded.base!r} has no trained classifier; evaluate an adapter that has one")
    if loss_on not in ("assistant", "all"):
        raise ConfigError(f"loss_on = {loss_on!r} must be assistant or all")
    classes = None
    if loaded.task is TaskType.SEQ_CLS:
        classes = _classes(loaded, rows)
        if exact or extract is not None:
            raise ConfigError("a classifier does not write answers; leave out exact and extract")
    positions = positions_of(loaded.model.config)
    if positions is not None:
        max_length = min(max_length, positions)
    encoder = Encoder(loaded.tokenizer, max_length, loss_on=loss_on, template_file=template_file, labels=classes)
    judged: list[Example] = []
    encoded: list[Encoded] = []
    for row in rows:
        for encoded_row in encoder.encode([row]):  # empty if the row has no token to evaluate
            judged.append(row)
            encoded.append(encoded_row)
    if not judged:
        raise DataError(
            f"none of the {len(rows)} rows has a token to evaluate; is the answer missing, or cut by max_length?"
        )
    run = _Run(loaded, batch_size, progress, Evaluation(len(judged), encoder.account))
    if classes is not None:
        run.classify(judged, encoded, classes)
        return run.evaluation
    judges = _judges(exact, extract)
    if not judges:
        run.losses(encoded)
        return run.evaluation
    questions = [_Question(row, *encoder.asked(row)) for row in rows]
    writer = Writer(loaded, sampling or Sampling(), template_file=template_file)
    _check_questions(questions, judges, writer)
    run.losses(encoded)
    run.answer(writer, questions, judges)
    return run.evaluation


class _Question(NamedTuple):
    """A row to be answered."""

    row: Example
    prompt: list[int]
    """Its tokens."""
    answer: str
    """The expected answer."""


Judges = dict[str, Callable[[str], str | None]]
"""For each measure, by name, a function that finds the part of an answer to compare."""


@dataclass
class _Run:
    """An evaluation in progress."""

    loaded: Loaded
    batch_size: int
    progress: Progress
    evaluation: Evaluation

    def losses(self, encoded: list[Encoded]) -> None:
        """Compute the loss, perplexity and token accuracy of each model over all judged tokens."""
        for name in self.loaded.names:
            total, count, hits, _ = self._sums(name, encoded).sum(0).tolist()
            loss = total / count
            self.evaluation.results[name] = {
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "token_accuracy": hits / count,
            }

    def classify(self, rows: list[Example], encoded: list[Encoded], classes: list[str]) -> None:
        """Compute the loss, accuracy and macro F1 of each classifier.

        A base model without a trained classifier is replaced by the prediction of the most frequent class.
        """
        results = self.evaluation.results
        wanted = [row["labels"] for row in encoded]
        predictions: dict[str, list[int]] = {}
        names = self.loaded.names
        if not self.loaded.base_is_whole:
            names = self.loaded.adapters
            most_frequent, _ = Counter(sorted(wanted)).most_common(1)[0]
            predictions[MAJORITY] = [most_frequent] * len(wanted)
            results[MAJORITY] = {}
        for name in names:
            sums = self._sums(name, encoded)
            predictions[name] = sums[:, 3].long().tolist()
            results[name] = {"loss": float(sums[:, 0].mean())}
        for name, predicted in predictions.items():
            hits = sum(p == w for p, w in zip(predicted, wanted, strict=True))
            results[name]["accuracy"] = hits / len(wanted)
            results[name]["macro_f1"] = macro_f1(predicted, wanted)
        for i, row in enumerate(rows):
            answers = {name: classes[predicted[i]] for name, predicted in predictions.items()}
            record = {"place": row.place, "text": row.text, "wanted": row.label, "answers": answers}
            self.evaluation.records.append(record)

    def answer(self, writer: Writer, questions: list[_Question], judges: Judges) -> None:
        """Let each model write answers, and judge them."""
        records = []
        for row, prompt, right in questions:
            text = writer.tokenizer.decode(prompt)
            records.append({"place": row.place, "prompt": text, "wanted": right, "answers": {}})
        self.evaluation.records = records
        for name in self.loaded.names:
            self._answer_as(name, writer, questions, judges)

    def _answer_as(self, name: str, writer: Writer, questions: list[_Question], judges: Judges) -> None:
        """Let one model write answers, and judge them."""
        hits = dict.fromkeys(judges, 0)
        unfinished = 0
        for i, answer in self._written(writer, name, questions):
            right = questions[i].answer
            record = {"text": answer.text, "ended": answer.ended}
            for measure, part in judges.items():
                is_right = same(part(answer.text), part(right) or "")
                record[measure] = is_right
                hits[measure] += is_right
            unfinished += not answer.ended
            self.evaluation.records[i]["answers"][name] = record
        result = self.evaluation.results[name]
        for measure, count in hits.items():
            result[measure] = count / len(questions)
        result["unfinished"] = unfinished / len(questions)

    def _written(self, writer: Writer, name: str, questions: list[_Question]) -> Iterator[tuple[int, Answer]]:
        """Yield (index of the question, answer) for all questions, batch by batch."""
        done = 0
        for indices in _batches([len(question.prompt) for question in questions], self.batch_size):
            batch = [questions[i] for i in indices]
            facts = {}
            for key in batch[0].row.facts:
                facts[key] = torch.tensor([question.row.facts[key] for question in batch])
            answers = writer.write([name], [question.prompt for question in batch], facts=facts)
            yield from zip(indices, answers, strict=True)
            done += len(batch)
            self.progress(f"{name} writes", done, len(questions))

    @torch.no_grad()
    def _sums(self, name: str, encoded: list[Encoded]) -> Tensor:
        """For each row, (rows, 4): the summed loss, the tokens, the right ones, and the most likely class."""
        model = self.loaded.model
        device = next(model.parameters()).device
        collate = Collator(pad_of(self.loaded.tokenizer))
        sums = torch.zeros(len(encoded), 4, dtype=torch.float64)
        done = 0
        with self.loaded.running(name):
            for indices in _batches([len(row["input_ids"]) for row in encoded], self.batch_size):
                batch = collate([encoded[i] for i in indices])
                inputs = {key: tensor.to(device) for key, tensor in batch.items()}
                logits = model(**inputs).logits
                sums[indices, :3] = token_sums(logits, inputs["labels"]).double().cpu()
                if logits.dim() == 2:  # (batch, classes)
                    sums[indices, 3] = logits.argmax(-1).double().cpu()
                done += len(indices)
                self.progress(name, done, len(encoded))
        return sums


def _batches(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Yield batches of indices of rows with similar lengths, the longest first, so a lack of memory shows early."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _classes(loaded: Loaded, rows: Sequence[Example]) -> list[str]:
    """The class names in order. If the model has no names, the data must use the numbers of the classes."""
    if loaded.labels is not None:
        return loaded.labels
    numbers = [str(i) for i in range(loaded.model.num_labels)]
    other = next((row for row in rows if row.label not in numbers), None)
    if other is not None:
        raise ConfigError(
            f"it is unknown which of the model's {len(numbers)} classes is {other.label!r} ({other.place}); give the "
            "names of the classes in the order of training with labels"
        )
    return numbers


def _judges(exact: bool, extract: str | None) -> Judges:
    judges: Judges = {}
    if exact:
        judges["exact_match"] = lambda text: text
    if extract is not None:
        judges["extracted_match"] = Extract(extract)
    return judges


def _check_questions(questions: list[_Question], judges: Judges, writer: Writer) -> None:
    """Raise, before any model runs, if an expected answer has no part to compare or a prompt is too long."""
    for row, prompt, right in questions:
        if any(part(right) is None for part in judges.values()):
            raise DataError(f"{row.place}: extract finds nothing in the expected answer {shortened(right)}")
        writer.check_room(len(prompt), row.place)


def shortened(text: str, most: int = 60) -> str:
    """The text in quotes, without its middle if it is longer than `most`."""
    text = repr(text)
    if len(text) <= most:
        return text
    return text[: most // 2] + "..." + text[-most // 2 :]


PADDING = re.compile(r"^[\s$€£]+|[\s.]+$")
"""Characters around a number that are ignored when answers are compared."""


class Extract:
    """Finds an answer in a text by the last match of a pattern.

    Args:
        pattern: a regular expression. The answer is its first group or, without a group, the rest of the line after the
            match ("####" finds the 18 of "#### 18").

    Raises:
        ConfigError: `pattern` is not a regular expression.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"extract = {pattern!r} is not a regular expression: {error}") from None

    def __call__(self, text: str) -> str | None:
        matches = list(self.pattern.finditer(text))
        if not matches:
            return None
        last = matches[-1]
        if not self.pattern.groups:
            rest_of_line, _, _ = text[last.end() :].partition("\n")
            return rest_of_line.strip()
        answer = last.group(1) or ""
        return answer.strip()


def same(answer: str | None, wanted: str) -> bool:
    """Whether two answers agree: as numbers if both are (1,000 is 1000.0, and $18. is 18), otherwise word by word."""
    if answer is None:
        return False
    number = _number(answer)
    wanted_number = _number(wanted)
    if number is not None and wanted_number is not None:
        return number == wanted_number
    return answer.split() == wanted.split()


def _number(text: str) -> Decimal | None:
    """The number that a text consists of; None for any other text."""
    digits = PADDING.sub("", text).replace(",", "")
    try:
        number = Decimal(digits)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def macro_f1(predicted: list[int], wanted: list[int]) -> float:
    """The mean of F1 (the harmonic mean of precision and recall) over all classes that are predicted or wanted."""
    scores = []
    for label in {*predicted, *wanted}:
        hits = sum(p == w == label for p, w in zip(predicted, wanted, strict=True))
        scores.append(2 * hits / (predicted.count(label) + wanted.count(label)))
    return sum(scores) / len(scores)
