"""The demo's data: one schema, no doubles, and nothing held out that was also trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

DATA = Path(__file__).parent.parent / "examples" / "data"
TRAIN, HELD_OUT = "reminders-train.jsonl", "reminders-heldout.jsonl"


def rows(file: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]


def answers(file: str) -> list[dict[str, str | None]]:
    return [json.loads(row["completion"]) for row in rows(file)]


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


both = pytest.mark.parametrize("file", [TRAIN, HELD_OUT])


def test_sizes():
    assert 200 <= len(rows(TRAIN)) <= 280 and len(rows(HELD_OUT)) == 24


@both
def test_each_row_is_a_prompt_and_a_completion(file: str):
    for row in rows(file):
        assert row.keys() == {"prompt", "completion"}
        assert row["prompt"] == row["prompt"].strip() != ""


@both
def test_each_completion_is_compact_json_of_one_schema(file: str):
    for row in rows(file):
        answer = json.loads(row["completion"])
        assert list(answer) == ["task", "when", "note"]
        assert isinstance(answer["task"], str)
        assert all(value is None or value == value.strip() != "" for value in answer.values())
        assert row["completion"] == json.dumps(answer, separators=(",", ":"), ensure_ascii=False)


@both
def test_notes_are_the_users_own_words(file: str):
    for row, answer in zip(rows(file), answers(file), strict=True):
        assert answer["note"] is None or plain(answer["note"]) in plain(row["prompt"]), row


@both
def test_clock_times_are_written_in_one_way(file: str):
    for answer in answers(file):
        digits = re.findall(r"\d+:\S+(?: .*)?|\d+ ?[ap]m", answer["when"] or "")
        assert all(re.fullmatch(r"([1-9]|1[0-2]):[0-5]\d( [ap]m)?", time) for time in digits), answer


@both
def test_when_is_found_only_where_the_prompt_has_one(file: str):
    """Each word of `when` is in the prompt, but for numbers: those may be said in words or as half past."""
    for row, answer in zip(rows(file), answers(file), strict=True):
        said = set(plain(row["prompt"]).split())
        words = [word for word in plain(answer["when"] or "").split() if not word.isdigit()]
        missing = [word for word in words if not any(other.startswith(word) for other in said)]
        assert missing in ([], ["am"], ["minutes"], ["hours"], ["pm"]), (row, missing)


def test_both_sorts_of_null_occur_often():
    for field in ("when", "note"):
        missing = sum(answer[field] is None for answer in answers(TRAIN))
        assert len(rows(TRAIN)) / 10 < missing < len(rows(TRAIN)) * 0.7


def test_no_prompt_twice_and_none_in_both():
    prompts = [plain(row["prompt"]) for file in (TRAIN, HELD_OUT) for row in rows(file)]
    assert len(prompts) == len(set(prompts))


def test_held_out_tasks_are_other_tasks():
    trained = {plain(answer["task"] or "") for answer in answers(TRAIN)}
    assert not trained & {plain(answer["task"] or "") for answer in answers(HELD_OUT)}


def test_the_recipe_is_one_that_can_be_run():
    from veneer.data.shapes import shape_of
    from veneer.files.recipe import read
    from veneer.train.recipe import make

    recipe = make(read(DATA.parent / "reminders.yaml"))
    for source, file in ((recipe.data[0], TRAIN), (recipe.eval_data[0], HELD_OUT)):
        assert (DATA.parent.parent / source.path).samefile(DATA / file)
        assert shape_of("", rows(file)[0], recipe.task) == "prompt"
