"""Rows as they come: what cannot be read or encoded names its file and its row."""

from __future__ import annotations

import json

import pytest

from veneer import VeneerError
from veneer.data.prepare import _label_order
from veneer.data.shapes import shape_of, understand
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


EXCHANGE = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("is_list", [False, True])
def test_json_is_read_as_what_it_is(name: str, is_list: bool, tmp_path):
    """A list called .jsonl, and JSON Lines called .json."""
    written = json.dumps([EXCHANGE] * 3, indent=1) if is_list else "\n\n".join([json.dumps(EXCHANGE)] * 3) + "\n"
    (tmp_path / name).write_text(written)
    assert [row for _, row in read(tmp_path / name)] == [EXCHANGE] * 3


def test_one_object_over_several_lines_is_a_json_file(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"version": 1, "data": [EXCHANGE]}, indent=2))
    assert [row for _, row in read(tmp_path / "rows.json")] == [EXCHANGE]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_with_other_delimiters_and_encodings(delimiter: str, encoding: str, tmp_path):
    text = f'prompt{delimiter}completion\n"a, b; c"{delimiter}木\n'
    (tmp_path / "rows.csv").write_text(text, encoding=encoding)
    assert [row for _, row in read(tmp_path / "rows.csv")] == [{"prompt": "a, b; c", "completion": "木"}]


def test_a_comma_in_a_name_of_the_heading_separates_nothing(tmp_path):
    (tmp_path / "rows.csv").write_text('"prompt, short";completion\na;b\n')
    assert [row for _, row in read(tmp_path / "rows.csv")] == [{"prompt, short": "a", "completion": "b"}]


def test_a_large_cell(tmp_path):
    (tmp_path / "rows.csv").write_text("text\n" + "x" * 300_000 + "\n")
    [(_, row)] = read(tmp_path / "rows.csv")
    assert len(row["text"]) == 300_000


def test_gbk_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "薄木片" * 20}, ensure_ascii=False), encoding="gbk")
    with pytest.raises(DataError, match="it reads as GBK: iconv -f GB18030 -t UTF-8"):
        read(tmp_path / "rows.jsonl")


def test_home_patterns_and_the_layout_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set" / "data").mkdir(parents=True)
    for name in ("train-0.jsonl", "train-1.jsonl", "test-0.jsonl"):
        (tmp_path / "set" / "data" / name).write_text(json.dumps({"text": name}))
    for path in ("~/set", "~/set/data/train-*.jsonl", tmp_path / "set" / "**" / "train-*"):
        assert [row["text"] for _, row in read(path)] == ["train-0.jsonl", "train-1.jsonl"]
    with pytest.raises(DataError, match="no data file matches the pattern"):
        read(tmp_path / "set" / "*.parquet")


def test_nulls_that_arrow_adds_are_taken_out(tmp_path):
    """In objects of any depth; a column that is null stays, as in a file of JSON."""
    import pyarrow
    from pyarrow.parquet import write_table

    original = [
        {"tools": [{"name": "weather", "parameters": {"city": {"type": "string"}}}], "note": None},
        {"tools": [{"name": "clock", "parameters": {"zone": {"type": "string"}}}], "note": "x"},
    ]
    write_table(pyarrow.Table.from_pylist(original), tmp_path / "rows.parquet")
    assert [row for _, row in read(tmp_path / "rows.parquet")] == original


def example(**row):
    return understand("here:1", row, shape_of("here:1", row))


def test_sharegpt_is_a_conversation():
    said = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    messages = example(conversations=said).messages
    assert messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]


@pytest.mark.parametrize("name", ["gpt", "bot", "Assistant", "ASSISTANT", "model", "chatgpt"])
def test_other_names_of_the_assistant(name: str):
    messages = example(messages=[{"role": "User", "content": "q"}, {"role": name, "content": "a"}]).messages
    assert messages[0]["role"] == "user" and messages[1]["role"] in ("assistant", "model")


def test_a_conversation_with_unknown_roles_alone_is_refused():
    with pytest.raises(DataError, match="here:1: no message is the assistant's; the roles are user, robot"):
        example(messages=[{"role": "user", "content": "q"}, {"role": "robot", "content": "a"}])


def test_content_in_parts_is_joined_or_refused():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]
    assert [message["content"] for message in example(messages=said).messages] == ["one two", "one "]
    assert example(prompt=said[:1], completion=said[1:]).messages[0]["content"] == "one two"
    parts.append({"type": "image", "url": "x.png"})
    with pytest.raises(DataError, match="a part that is not text: {'type': 'image'"):
        example(messages=said)


def test_preferences_are_pointed_to_what_takes_them():
    with pytest.raises(DataError, match="a chosen and a rejected answer.*--objective dpo"):
        example(prompt="q", chosen="a", rejected="b")
