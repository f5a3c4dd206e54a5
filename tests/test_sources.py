"""Rows as they come: what cannot be read or encoded names its file and its row."""

from __future__ import annotations

import json

import pytest

from veneer import VeneerError
from veneer.data.prepare import _label_order
from veneer.data.sources import Source, rows
from veneer.errors import DataError


def read(path):
    return list(rows(Source(path=str(path))))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi \ud83d", "completion": "ok"},
        {"prompt": "\ude00 hi", "completion": "ok"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b \ud83d"}]},
        {"prompt": "a", "completion": "b", "tags": {"\ud83d": 1}},
    ],
    ids=["first half", "second half", "in a conversation", "in a name"],
)
def test_half_a_character_names_its_row(row: dict, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "\U0001f600"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2 holds \\ud[8e]\w\w, half of a character"):
        read(file)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_number_that_python_does_not_read_names_its_row(name: str, tmp_path):
    row = '{"prompt": "q", "completion": "a", "n": ' + "9" * 5000 + "}"
    (tmp_path / name).write_text(row if name.endswith("l") else f"[{row}]")
    with pytest.raises(DataError, match=f"{name}:1 holds a number with too many digits"):
        read(tmp_path / name)


def test_classes_are_ordered_by_value_where_they_are_numbers():
    """Digits of other kinds (superscripts, circled) and endless ones are names, as any other text."""
    names = ["10", "²", "9", "b", "①", "٣", "a", "9" * 5000]
    assert sorted(names, key=_label_order)[:2] == ["9", "10"]
    assert issubclass(DataError, VeneerError)
