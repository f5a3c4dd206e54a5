"""`veneer eval`: its numbers, computed again by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from veneer import ALoraConfig, LoraConfig, LoReftConfig, PolyConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig
from veneer.core.config import TaskType
from veneer.data.sources import Source
from veneer.errors import ConfigError, DataError
from veneer.inference.evaluation import MAJORITY, Extract, evaluate, macro_f1, read, same, task_of
from veneer.inference.generation import Sampling, Writer
from veneer.model.loading import BASE, load
from veneer.train.recipe import make
from veneer.train.run import train

from .forked import veneer
from .test_loading import adapter, bases  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [{"question": "What is " + "0123456789"[: n + 1] + "?", "answer": f"It is {n}\n#### {n}"} for n in range(7)]
SHORT = Sampling(max_new_tokens=6)


def written(path: Path, rows: list[dict]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


@pytest.fixture
def data(tmp_path) -> Source:
    return written(tmp_path / "rows.jsonl", ROWS)


def test_losses_are_what_training_says(bases, data, tmp_path):  # noqa: F811
    """The same loss, perplexity and accuracy as the run's own evaluation, before and after."""
    own = dict(model=str(bases / "one"), data=data.path, eval_data=data.path, batch_size=3, max_steps=6, rank=2)
    report = train(make(own | dict(output=str(tmp_path / "out"), learning_rate=1e-2)), console=Console(quiet=True))
    loaded = load([str(tmp_path / "out")])
    found = evaluate(loaded, read(loaded, [data]), batch_size=2)
    for name, said in ((BASE, report["eval"]["before"]), ("out", report["eval"])):
        for ours, theirs in (("loss", "loss"), ("perplexity", "perplexity"), ("token_accuracy", "accuracy")):
            assert found.results[name][ours] == pytest.approx(said[theirs], rel=1e-5), (name, ours)
    assert found.results["out"]["loss"] < found.results[BASE]["loss"]
    assert found.rows == 7 and found.account.supervised_tokens == sum(len(r["answer"]) + 1 for r in ROWS)


CONFIGS = {
    "lora": LoraConfig(r=2, task_type="CAUSAL_LM"),
    "vera": VeraConfig(r=3, task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "loreft": LoReftConfig(task_type="CAUSAL_LM"),
    "poly": PolyConfig(r=2, task_type="CAUSAL_LM", n_tasks=3, target_modules=["q_proj"]),
    "alora": ALoraConfig(r=2, task_type="CAUSAL_LM", alora_invocation_tokens=[64]),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_batch_says_what_each_row_says_alone(bases, tmp_path, method):  # noqa: F811
    """Losses and written answers, padded and sorted, are those of single rows, in the rows' order."""
    rows = [row | ({"task_ids": i % 3} if method == "poly" else {}) for i, row in enumerate(ROWS)]
    loaded = load([adapter(bases, tmp_path / "a", CONFIGS[method])])
    examples = read(loaded, [written(tmp_path / "rows.jsonl", rows)])
    found = evaluate(loaded, examples, batch_size=4, exact=True, sampling=SHORT)
    losses, counts = [], []
    for i, example in enumerate(examples):
        alone = evaluate(loaded, [example], exact=True, sampling=SHORT)
        losses.append(alone.results["a"]["loss"])
        counts.append(alone.account.supervised_tokens)
        assert found.records[i] == alone.records[0]
    mean = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)
    assert found.results["a"]["loss"] == pytest.approx(mean, rel=1e-5)
    assert abs(found.results["a"]["loss"] - found.results[BASE]["loss"]) > 1e-4
    assert {r["answers"]["a"]["text"] != r["answers"][BASE]["text"] for r in found.records} != {False}


def test_right_answers_are_counted(bases, data, tmp_path, monkeypatch):  # noqa: F811
    """The models' answers are put into their mouths."""
    from veneer.inference.generation import Answer

    loaded = load([adapter(bases, tmp_path / "a")])
    examples = read(loaded, [data])
    right = {"a": {0, 1, 4}, BASE: {2}}

    def write(self, names, prompts, **kwargs):
        found = []
        for ids in prompts:
            text = self.tokenizer.decode(ids)
            n = next(i for i, row in enumerate(ROWS) if row["question"] in text)
            assert text.endswith("<|im_start|>assistant\n")
            hit, whole = n in right[names[0]], names[0] == "a"
            found.append(Answer(ROWS[n]["answer"] if hit and whole else f"#### {n if hit else 99}.00", 5, n != 6))
        return found

    monkeypatch.setattr(Writer, "write", write)
    found = evaluate(loaded, examples, exact=True, extract="####", batch_size=2, sampling=SHORT)
    assert found.results["a"]["exact_match"] == found.results["a"]["extracted_match"] == pytest.approx(3 / 7)
    assert found.results[BASE]["extracted_match"] == pytest.approx(1 / 7) and found.results[BASE]["exact_match"] == 0
    assert found.results["a"]["unfinished"] == pytest.approx(1 / 7)
    assert [r["answers"]["a"]["exact_match"] for r in found.records] == [i in right["a"] for i in range(7)]
    assert found.records[4]["wanted"] == ROWS[4]["answer"]


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("####", "so\n#### 18", "18"),
        ("####", "#### 1\n####  2 \nmore", "2"),
        (r"answer: (\d+)", "answer: 3, answer: 41", "41"),
        (r"(?i)the answer is", "The Answer is no", "no"),
        ("####", "nothing", None),
    ],
)
def test_what_is_extracted(pattern, text, found):
    assert Extract(pattern)(text) == found


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        ("1,000", "1000.0", True),
        ("$18.", "18", True),
        ("18", "19", False),
        ("-3", "3", False),
        ("two  words", "two words", True),
        ("Two words", "two words", False),
        ("nan", "nan", True),
        ("", "", True),
        (None, "", False),
    ],
)
def test_what_agrees(one, other, agree):
    assert same(one, other) is agree


def test_macro_f1_is_that_of_scikit_learn():
    f1_score = pytest.importorskip("sklearn.metrics").f1_score
    wanted, predicted = [0, 0, 0, 1, 1, 3], [0, 0, 1, 1, 2, 0]
    assert macro_f1(predicted, wanted) == pytest.approx(f1_score(wanted, predicted, average="macro"))
    assert macro_f1([0, 0], [0, 1]) == pytest.approx(1 / 3)


LABELLED = [{"text": "good " * n, "label": "good"} for n in range(1, 7)] + [
    {"text": "no " * n, "label": label} for n, label in ((1, "bad"), (2, "bad"), (9, "odd"))
]


def test_classes_are_judged_in_the_order_of_training(bases, tmp_path):  # noqa: F811
    """By hand, one row at a time; a wrong order of classes cannot pass."""
    source = written(tmp_path / "rows.jsonl", LABELLED)
    own = dict(model=str(bases / "one"), data=source.path, output=str(tmp_path / "out"), labels=["odd", "bad", "good"])
    train(make(own | dict(max_steps=12, learning_rate=3e-2, batch_size=9)), console=Console(quiet=True))
    loaded = load([str(tmp_path / "out")], task=task_of([source]))
    found = evaluate(loaded, read(loaded, [source]), batch_size=4)
    said, losses = [], []
    for row in LABELLED:
        ids = torch.tensor([loaded.tokenizer(row["text"]).input_ids])
        with torch.no_grad():
            scores = loaded.model(input_ids=ids).logits[0].log_softmax(-1)
        said.append(own["labels"][int(scores.argmax())])
        losses.append(-float(scores[own["labels"].index(row["label"])]))
    assert [record["answers"]["out"] for record in found.records] == said
    assert found.results["out"]["accuracy"] == sum(a == r["label"] for a, r in zip(said, LABELLED, strict=True)) / 9
    assert found.results["out"]["accuracy"] > 0.8
    assert found.results["out"]["loss"] == pytest.approx(sum(losses) / 9, rel=1e-5)
    assert found.results[MAJORITY] == {"accuracy": pytest.approx(6 / 9), "macro_f1": pytest.approx(0.8 / 3)}
    assert BASE not in found.results


def test_classes_without_names_are_asked_for(bases, tmp_path):  # noqa: F811
    classifier = adapter(bases, tmp_path / "c", classes=3)
    source = written(tmp_path / "rows.jsonl", LABELLED)
    loaded = load([classifier])
    with pytest.raises(ConfigError, match="it is unknown which of the model's 3 classes is 'good' .*give the names"):
        evaluate(loaded, read(loaded, [source]))
    named = load([classifier], labels=["odd", "bad", "good"])
    numbers = [row | {"label": ["odd", "bad", "good"].index(row["label"])} for row in LABELLED]
    by_number = evaluate(loaded, read(loaded, [written(tmp_path / "numbers.jsonl", numbers)])).results
    assert evaluate(named, read(named, [source])).results == by_number
    with pytest.raises(DataError, match="'good' is not one of a, b, c"):
        evaluate(load([classifier], labels=list("abc")), read(named, [source]))
    with pytest.raises(ConfigError, match="a classifier does not write answers"):
        evaluate(named, read(named, [source]), exact=True)
    bare = load(model=str(bases / "one"), task=TaskType.SEQ_CLS)
    with pytest.raises(ConfigError, match="has no trained classifier"):
        evaluate(bare, read(bare, [source]))


def test_rows_that_cannot_be_judged_are_named(bases, data, tmp_path):  # noqa: F811
    loaded = load([adapter(bases, tmp_path / "a")])
    labelled = written(tmp_path / "labelled.jsonl", LABELLED)
    with pytest.raises(
        DataError, match="labelled.jsonl:1 has a text and a label, but a writes text and does not classify"
    ):
        read(loaded, [labelled])
    texts = read(loaded, [labelled], task="text", limit=4)
    assert len(texts) == 4 and evaluate(loaded, texts).results["a"]["loss"] > 0
    with pytest.raises(DataError, match="labelled.jsonl:1 has no question with an answer"):
        evaluate(loaded, texts, exact=True)
    with pytest.raises(DataError, match=r"rows.jsonl:1: extract finds nothing in the expected answer 'It is 0"):
        evaluate(loaded, read(loaded, [data]), extract="answer:")
    with pytest.raises(ConfigError, match="not a regular expression"):
        evaluate(loaded, read(loaded, [data]), extract="(")
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: \d+ prompt tokens and 250 new tokens exceed the model's maximum of 256"
    ):
        evaluate(loaded, read(loaded, [data]), exact=True, sampling=Sampling(max_new_tokens=250))
    with pytest.raises(ConfigError, match="task = 'txt' must be auto, text, classification"):
        task_of([data], "txt")


def test_the_command_prints_lines_json_and_answers(bases, data, tmp_path):  # noqa: F811
    one, two = adapter(bases, tmp_path / "one"), adapter(bases, tmp_path / "two", seed=1)
    given = ["--adapter", one, "--adapter", two, "--data", data.path, "--limit", "5", "--batch-size", "2"]
    given += ["--extract", "####", "--max-new-tokens", "4"]
    answers = tmp_path / "answers.jsonl"
    done = veneer("eval", *given, "--save", str(answers))
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["base", "one", "two", "5"]
    assert "base: 5 of 5" in done.stderr and "two writes: 5 of 5" in done.stderr
    found = json.loads(veneer("eval", *given, "--json").stdout)
    assert found["rows"] == 5 and set(found["results"]) == {"base", "one", "two"}
    assert f"loss {found['results']['two']['loss']:.4f}  perplexity" in done.stdout.splitlines()[2]
    assert "extracted match 0.0%" in done.stdout  # nobody is right, and it says so
    assert math.log(found["results"]["one"]["perplexity"]) == pytest.approx(found["results"]["one"]["loss"])
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["wanted"] for row in rows] == [row["answer"] for row in ROWS[:5]]
    assert set(rows[0]["answers"]) == {"base", "one", "two"}
    assert json.loads(veneer("eval", *given, "--json").stdout) == found


def test_the_command_says_what_is_wrong_on_one_line(bases, data, tmp_path):  # noqa: F811
    done = veneer("eval", "--adapter", adapter(bases, tmp_path / "one"), "--data", data.path + "l")
    assert done.returncode == 2 and "there is no data file" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("nearest: rows.jsonl")
