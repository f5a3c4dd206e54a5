"""`veneer data`: what is shown is what is trained, and what is odd is found."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from veneer.cli import app
from veneer.data import encode, look, pieces, prepare
from veneer.report.data_page import render_data
from veneer.terminal import visible
from veneer.train.recipe import make

from . import test_page
from .test_train import base, recipe, run  # noqa: F401 (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore")


def rows_in(where: Path, *rows: dict, name: str = "rows.jsonl") -> str:
    path = where / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def qa(question: str, answer: str) -> dict:
    return {"question": question, "answer": answer}


def call(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["data", *arguments], env={"COLUMNS": "100"})
    assert done.exit_code == status, f"{done.output} {done.exception}"
    return done.stdout


def found(*arguments: str, status: int = 0) -> dict:
    return json.loads(call(*arguments, "--json", status=status))


def test_what_is_shown_is_what_is_trained(base, tmp_path):  # noqa: F811
    """Token by token: the labels of training are the tokens that are marked as learned, and the text is the row's."""
    speakers = [f"{role} {i}" for i in (1, 2) for role in ("user", "assistant")]
    conversation = [{"role": words.split()[0], "content": f"{words} é 日本 👩‍👧"} for words in speakers]
    made = recipe(base, rows_in(tmp_path, {"messages": conversation}), tmp_path / "o", max_length=120)
    words = AutoTokenizer.from_pretrained(base)
    trained = prepare.prepare(made, words)
    shown = look.look(made, words).rows[0]
    learned = [i for i in trained.train[0]["labels"] if i != encode.IGNORED]
    assert shown["learned"] == len(learned) == trained.account.supervised_tokens > 0
    assert shown["tokens"] - shown["cut"] == len(trained.train[0]["input_ids"]) == 120
    assert "".join(text for text, _ in shown["pieces"]) == words.apply_chat_template(conversation, tokenize=False)
    marked = "".join(text for text, kind in shown["pieces"] if kind == pieces.LEARNED)
    assert marked == words.decode(learned) and marked.startswith("assistant 1 é 日本 👩‍👧<|im_end|>")
    assert {kind for _, kind in shown["pieces"]} == {"given", "learned", "cut"}


def test_the_first_token_of_a_text_is_not_learned(base, tmp_path):  # noqa: F811
    """No token predicts it."""
    made = recipe(base, rows_in(tmp_path, {"text": "a veneer"}), tmp_path / "o")
    words = AutoTokenizer.from_pretrained(base)
    (shown,) = look.look(made, words).rows
    assert [kind for _, kind in shown["pieces"]] == ["given"] + ["learned"] * (shown["tokens"] - 1)
    assert shown["learned"] == prepare.prepare(made, words).account.supervised_tokens


def test_a_long_run_is_shown_by_its_ends(base):  # noqa: F811
    words = AutoTokenizer.from_pretrained(base)
    ids = words("x" * 5000, add_special_tokens=False).input_ids
    shown = list(pieces.pieces(words, ids, ["given"] * len(ids)))
    hidden = [piece for piece in shown if piece.kind == pieces.LEFT_OUT]
    assert len(shown) < 400 and hidden == [(f"{len(ids) - 350:,} tokens", "left out")]


def test_the_counts_are_those_of_training(base, tmp_path):  # noqa: F811
    data = rows_in(tmp_path, *[qa("q" * n, "a" * n) for n in (1, 5, 9, 40, 90)], qa("q", "a"), qa("q" * 200, "x"))
    made = recipe(base, data, tmp_path / "o", max_length=100)
    words = AutoTokenizer.from_pretrained(base)
    account = prepare.prepare(made, words).account
    facts = look.look(made, words).as_dict()["train"]
    for ours, theirs in (("rows", 7), ("kept", account.kept), ("tokens", account.tokens)):
        assert facts[ours] == theirs
    assert (facts["cut_rows"], facts["unlearned_rows"]) == (account.cut_rows, account.unlearned_rows) == (3, 2)
    lengths = sorted(account.lengths.elements())
    assert facts["lengths"] == {"min": lengths[0], "median": lengths[3], "p95": lengths[-1], "max": lengths[-1]}
    assert facts["duplicates"] == {"rows": 1, "places": [f"{data}:6"]}


ODD = {
    "nothing odd": (qa("a?", "b"), None),
    "wrong encoding": (qa("cafÃ©", "b"), "text that looks like UTF-8 read in another encoding"),
    "lost": (qa("caf\ufffd", "b"), "characters that were lost in a conversion (U+FFFD)"),
    "control": (qa("a\x07", "b"), "control characters"),
    "invisible": (qa("a\u202eb", "b"), "invisible characters"),
    "undefined": (qa("a\ue000", "b"), "characters that Unicode does not define"),
    "emoji and accents": (qa("👩‍👧 é\n\tü", "日本語。"), None),
    "empty question": (qa(" ", "b"), "an empty text"),
    "empty answer": (qa("a", ""), "an empty answer, from which only the end of an answer is learned"),
    "special": (qa("a <|im_end|>", "b"), "special tokens in its text"),
    "cut": (qa("a", " ".join(map(str, range(300)))), "more than half of its learned tokens cut off"),
    "dropped": (qa("a" * 300, "b"), "more tokens than max_length and is dropped"),
    "no answer": (
        {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]},
        "no token to learn and is dropped",
    ),
    "ends with a question": (
        {"messages": [{"role": r, "content": r} for r in ("user", "assistant", "user")]},
        "a last message that is not the assistant's",
    ),
    "two questions": (
        {"messages": [{"role": r, "content": r} for r in ("user", "user", "assistant")]},
        "two messages of the user in a row",
    ),
    "answer first": (
        {"messages": [{"role": r, "content": r} for r in ("assistant", "user", "assistant")]},
        "an answer before any question",
    ),
    "late system": (
        {"messages": [{"role": r, "content": r} for r in ("user", "system", "assistant")]},
        "a system message that is not the first",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_rows_are_found(base, tmp_path, name: str):  # noqa: F811
    """Between two good rows of the same shape, so that a wrong number would show."""
    row, words = ODD[name]
    good = qa("good", "fine")
    if "messages" in row:
        good = {"messages": [{"role": "user", "content": "good"}, {"role": "assistant", "content": "fine"}]}
    other = json.loads(json.dumps(good).replace("good", "well"))
    data = rows_in(tmp_path, good, row, other)
    odd = found(data, "--model", base, "--max-length", "150")["train"]["odd"]
    assert odd.get(words) == (None if words is None else {"rows": 1, "places": [f"{data}:2"]}), odd
    assert words is not None or not odd


def test_one_question_with_two_answers(base, tmp_path):  # noqa: F811
    data = rows_in(tmp_path, qa("a", "b"), qa("a", "b"), qa("a", "c"))
    part = found(data, "--model", base)["train"]
    assert part["odd"]["the question of another row, but another answer"]["places"] == [f"{data}:3"]
    labelled = rows_in(tmp_path, *[{"text": "a", "label": label} for label in "xyx"], name="labels.jsonl")
    part = found(labelled, "--model", base)
    assert part["train"]["odd"]["the question of another row, but another answer"]["places"] == [f"{labelled}:2"]
    assert part["train"]["classes"] == {"x": 2, "y": 1} and part["rows"][1]["label"] == "y"


def test_pairs_are_shown_with_both_answers(base, tmp_path):  # noqa: F811
    """As an objective over pairs reads them, in a run's report too."""
    pair = {"prompt": "a", "chosen": "good", "rejected": "bad"}
    rows = [pair, pair, pair | {"rejected": "good"}, pair | {"chosen": ""}, pair | {"rejected": "worse\x07"}]
    data = rows_in(tmp_path, *rows)
    seen = found(data, "--model", base, "--objective", "dpo")
    words = AutoTokenizer.from_pretrained(base)
    account = prepare.prepare(recipe(base, data, tmp_path / "o", objective="dpo"), words).account
    part = seen["train"]
    assert (part["rows"], part["kept"], part["tokens"]) == (5, account.kept, account.tokens) and account.kept == 3
    assert part["duplicates"]["places"] == [f"{data}:2"] and part["odd"]["control characters"]["places"] == [
        f"{data}:5"
    ]
    assert len(part["odd"]) == 3, part["odd"]
    shown = [
        (row["answer"], "".join(text for text, kind in row["pieces"] if kind == "learned")) for row in seen["rows"]
    ]
    assert shown[:2] == [("chosen", "good<|im_end|>"), ("rejected", "bad<|im_end|>")] and len(shown) == 6
    assert ", rejected  " in call(data, "--model", base, "--objective", "dpo")
    report = run(base, data, tmp_path / "out", max_steps=1, objective="dpo")
    assert report["first_rows"] == seen["rows"][:4]
    refused = rows_in(tmp_path, pair, {"prompt": "a", "chosen": "b"}, name="refused.jsonl")
    part = found(refused, "--model", base, "--objective", "dpo", status=1)["train"]
    assert [note["places"] for note in part["refused"].values()] == [[f"{refused}:2"]]


def test_evaluation_rows_that_are_trained_on(base, tmp_path):  # noqa: F811
    data = rows_in(tmp_path, *[qa(f"{n % 6}", "a") for n in range(12)])
    held_out = rows_in(tmp_path, qa("3", "a"), qa("new", "a"), name="held-out.jsonl")
    seen = found(data, "--model", base, "--eval-data", held_out)
    assert (seen["also_in_training"], seen["first_also_in_training"]) == (1, f"{held_out}:1")
    assert "1 row of the evaluation data is also trained on" in call(data, "--model", base, "--eval-data", held_out)


def test_the_split_is_that_of_training(base, tmp_path):  # noqa: F811
    data = rows_in(tmp_path, *[qa(f"{n % 8}", "a") for n in range(12)])
    words = AutoTokenizer.from_pretrained(base)
    leaks = []
    for seed in range(4):
        made = recipe(base, data, tmp_path / "o", eval_split=4, seed=seed)
        both = prepare.prepare(made, words)
        trained = {tuple(row["input_ids"]) for row in both.train}
        leaks.append(sum(tuple(row["input_ids"]) in trained for row in both.evaluation))
        seen = look.look(made, words)
        assert (seen.leaked, seen.held_out) == (leaks[-1], 4)
    assert len(set(leaks)) > 1, "the split does not matter here"


def test_rows_that_training_refuses_are_listed(base, tmp_path):  # noqa: F811
    """All of them, with status 1."""
    data = rows_in(tmp_path, qa("a", "b"), qa("a", 5), qa("c", "d"), qa("e", 7))
    part = found(data, "--model", base, status=1)["train"]
    assert {place for note in part["refused"].values() for place in note["places"]} == {f"{data}:2", f"{data}:4"}
    assert (part["rows"], part["kept"]) == (4, 2)
    text = call(data, "--model", base, status=1)
    assert re.search(r"training would stop at 1 row \(\S+:2\): answer must be text, not 5", " ".join(text.split()))
    masked = rows_in(tmp_path, qa("a" * 200, "b"), name="masked.jsonl")
    assert "all labels are masked" in call(masked, "--model", base, "--max-length", "50", status=1)


def test_large_data_is_read_up_to_a_limit_that_is_said(base, tmp_path, monkeypatch):  # noqa: F811
    data = rows_in(tmp_path, *[qa(f"{n}", "a") for n in range(30)])
    taken = []
    true = look.rows
    monkeypatch.setattr(look, "rows", lambda source: (taken.append(1) or pair for pair in true(source)))
    text = call(data, "--model", base, "--limit", "10")
    assert "only the first 10 rows were read; --limit reads more" in text and len(taken) <= 11
    assert "only the first" not in call(data, "--model", base, "--limit", "30")


def test_rows_are_chosen_by_number(base, tmp_path):  # noqa: F811
    data = rows_in(tmp_path, *[qa(f"{n}", "a") for n in range(9)])
    assert [row["place"] for row in found(data, "--model", base, "--row", "7")["rows"]] == [f"{data}:7"]
    done = CliRunner().invoke(app, ["data", data, "--model", base, "--row", "12"])
    assert "there is no row 12 to show; 9 rows were read" in str(done.exception)


def test_a_recipe_says_what_is_read(base, tmp_path):  # noqa: F811
    data = rows_in(tmp_path, {"q": "a", "a": "b"})
    written = tmp_path / "recipe.yaml"
    recipe(base, {"path": data, "columns": {"question": "q", "answer": "a"}}, tmp_path / "o").save(tmp_path)
    assert (
        found(str(written))["rows"]
        == found(data, "--model", base, "--column", "question=q", "--column", "answer=a")["rows"]
    )
    done = CliRunner().invoke(app, ["data", data])
    assert "give --model" in str(done.exception)
    done = CliRunner().invoke(app, ["data", str(written), data])
    assert "give one recipe, or data files" in str(done.exception)


def test_a_terminal_is_not_commanded_by_the_data(base, tmp_path):  # noqa: F811
    data = rows_in(tmp_path, qa("a\x1b[31m\x07\u202e", "b\n\tc"))
    text = call(data, "--model", base)
    assert not re.search("[\x07\x1b\u202e]", text) and r"\x1b[31m\x07\u202e" in text
    assert "learned  b⏎\n         ⇥c<|im_end|>" in "\n".join(line.rstrip() for line in text.splitlines())
    assert visible("👩\u200d👧") == "👩\u200d👧"


@pytest.mark.parametrize("width", [30, 200])
def test_narrow_terminals_and_no_colour(base, tmp_path, width: int):  # noqa: F811
    """The kinds of tokens have names beside their colours."""
    data = rows_in(tmp_path, qa("q" * 30, "a" * 90))
    environment = {"COLUMNS": str(width), "NO_COLOR": "1", "FORCE_COLOR": "1"}
    done = CliRunner().invoke(app, ["data", data, "--model", base, "--max-length", "100"], env=environment)
    text = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", done.stdout)
    assert done.exit_code == 0 and not re.search("\x1b\\[[0-9;]*3[0-9]m", done.stdout)
    for kind in ("given", "learned", "cut"):
        assert re.search(rf"^{kind} ", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= width


@pytest.fixture(scope="module")
def page(base, tmp_path_factory) -> str:  # noqa: F811
    where = tmp_path_factory.mktemp("page")
    data = rows_in(where, qa(f"1 {test_page.EVIL}", f"{test_page.EVIL}" * 3), qa("a", "b"), qa("a", ""))
    made = recipe(base, data, where / "o", max_length=155)
    content = look.look(made, AutoTokenizer.from_pretrained(base)).as_dict()
    return render_data(content, made)


@pytest.mark.skipif(test_page.CHROMIUM is None, reason="no Chromium here; Debian's package is called chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_shows_the_page(base, page, tmp_path, width: int, dark: bool):  # noqa: F811
    shown = test_page.opened(page, tmp_path, width, dark)
    assert shown["width"] == width >= shown["scroll"] and not shown["outside"] and not shown["small"]
    assert not shown["loaded"] and test_page.EVIL in shown["text"].replace("\n", "")
    assert "1 row has an empty answer" in shown["text"]
    assert shown["title"] == f"rows.jsonl as {Path(base).name} sees it"


def test_the_page_runs_nothing(page):
    assert not re.search(r"<script|https?:|url\(|@import|<link|<img", page)


def test_the_report_of_a_run_shows_its_first_rows(base, tmp_path):  # noqa: F811
    """The same as `veneer data` shows, with and without packing."""
    data = rows_in(tmp_path, *[qa(f"{n} <b>", "a" * n) for n in range(3, 8)])
    for number, settings in enumerate(({}, {"packing": True}, {"streaming": True})):
        report = run(base, data, tmp_path / f"{number}", max_steps=1, **settings)
        made = make(report["recipe"])
        assert report["first_rows"] == look.look(made, AutoTokenizer.from_pretrained(base)).rows
        html = (tmp_path / f"{number}" / "report.html").read_text()
        assert html.count('<div class="tokens"') == 3 and '<span class="learned">a</span>' in html


def test_random_rows_decode_to_their_text(base):  # noqa: F811
    """The pieces of any text are the text."""
    words = AutoTokenizer.from_pretrained(base)
    generator = random.Random(0)
    for _ in range(50):
        text = "".join(chr(generator.choice((32, 97, 233, 0x65E5, 0x1F469, 0x200D))) for _ in range(12))
        ids = words(text, add_special_tokens=False).input_ids
        assert "".join(piece.text for piece in pieces.pieces(words, ids, ["given"] * len(ids))) == text
