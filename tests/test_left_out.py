"""What a chat template leaves out of a row is said by name, with the row; and rows that are probably not as meant."""

from __future__ import annotations

import json

import pytest

from veneer.data.encode import Encoder
from veneer.data.prepare import prepare
from veneer.data.shapes import Example, shape_of
from veneer.errors import DataError
from veneer.train.recipe import make

from .chat_templates import TEMPLATES
from .test_train_chat import FIRST, LOOKED, SYSTEM, TOOLS, tokenizer

ONLY_TALK = """{% for m in messages %}{% if m.role in ("user", "assistant") %}\
{{ m.role }}: {{ m.content or "" }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
"""Leaves out system messages, the results of tools, and calls."""
NAMES_ONLY = """{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content or "" }}\
{% for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
"""Leaves out the arguments of calls."""
TOOLS_ONLY = NAMES_ONLY.replace("[{{ call.function.name }}]", "")
"""Writes the tools, and so the name of each, but no calls."""
CHANGES = ONLY_TALK.replace('m.content or ""', 'm.content | upper | replace(" ", "_")')
"""Writes the contents in another form."""


def encoder(template: str) -> Encoder:
    made = tokenizer(TEMPLATES[0])
    made.chat_template = template
    return Encoder(made, 4096)


def calling(arguments) -> dict:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": arguments}}]}


ANSWER = {"role": "assistant", "content": "Thin wood."}


@pytest.mark.parametrize(
    ("template", "messages", "tools", "words"),
    [
        (ONLY_TALK, [SYSTEM, *FIRST], None, "does not write message 1, whose role is 'system'"),
        (ONLY_TALK, [FIRST[0], {"role": "tool", "content": "thin wood"}, ANSWER], None, "message 2, whose role is"),
        (ONLY_TALK, LOOKED, TOOLS, "does not write the tool call 'look' of message 2"),
        (TOOLS_ONLY, LOOKED, TOOLS, "does not write the tool call 'look' of message 2"),
        (NAMES_ONLY, LOOKED, TOOLS, "does not write the arguments of the tool call 'look' of message 2"),
        (NAMES_ONLY, [LOOKED[0], calling('{"a": 1}'), *LOOKED[2:]], None, "the arguments of the tool call 'look'"),
    ],
)  # fmt: skip
def test_a_part_that_the_template_leaves_out_is_refused_with_its_row(template, messages, tools, words):
    with pytest.raises(DataError, match=f"^rows.jsonl:7: the chat template .*{words}.*--chat-template"):
        encoder(template).tokens(Example("rows.jsonl:7", messages, tools))


def test_what_the_template_writes_in_another_form_is_not_left_out():
    row = encoder(CHANGES)
    row.tokens(Example("x:1", [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It is."}]))
    assert not row.account.notes
    encoder(NAMES_ONLY).tokens(Example("x:1", [LOOKED[0], calling({}), *LOOKED[2:]], None))


@pytest.mark.parametrize("stock", TEMPLATES, ids=str)
def test_nothing_of_whole_templates_is_called_left_out(stock):
    whole = Encoder(tokenizer(stock), 4096)
    conversations = [FIRST, FIRST * 6] + [[SYSTEM, *FIRST]] * bool(stock.system) + [LOOKED] * bool(stock.tools)
    for messages in conversations:
        whole.tokens(Example("x:1", messages, TOOLS if messages is LOOKED else None))
    assert not whole.account.notes


def test_tools_reasoning_empty_answers_and_unknown_roles_are_counted():
    row = encoder(ONLY_TALK.replace(' in ("user", "assistant")', ""))
    thinking = {**FIRST[1], "reasoning_content": "Seven times six."}
    for place, messages, tools in (
        ("x:1", FIRST, TOOLS),
        ("x:2", [FIRST[0], thinking], None),
        ("x:3", [FIRST[0], {"role": "assistant", "content": " "}], None),
        ("x:4", [FIRST[0], {"role": "assistant", "content": ""}], None),
        ("x:5", [*FIRST, {"role": "asistant", "content": "More."}], None),
        ("x:6", FIRST, None),
    ):
        row.tokens(Example(place, messages, tools))
    assert row.account.remarks() == [
        "1 row has tools that the chat template does not write (the first: x:1)",
        "1 row has reasoning_content that the chat template does not write (the first: x:2)",
        "2 rows have an empty answer, from which only the end of an answer is learned (the first: x:3)",
        "1 row has a message with the unknown role 'asistant', which is not learned (the first: x:5)",
    ]
    assert json.loads(json.dumps(row.account.as_dict()))["notes"]


@pytest.mark.parametrize("has_template", [True, False])
def test_a_run_tells_of_empty_answers_and_refuses_nothing_but(has_template, tmp_path):
    file = tmp_path / "rows.jsonl"
    made = tokenizer(TEMPLATES[0])
    if not has_template:
        made.chat_template = None
    recipe = make(dict(model="x", output="y", data=str(file)))
    file.write_text("".join(json.dumps({"question": "a", "answer": "b" * (i % 2)}) + "\n" for i in range(6)))
    (line,) = prepare(recipe, made, ()).account.warnings(recipe.max_length)
    assert line.startswith("3 rows have an empty answer") and f"{file}:1" in line
    file.write_text('{"question": "a", "answer": ""}\n' * 3)
    with pytest.raises(DataError, match="all 3 rows of the data have an empty answer .*rows.jsonl:1"):
        prepare(recipe, made, ())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "--objective dpo.*--column completion=chosen"),
        ({"chosen": [], "rejected": []}, "--objective dpo.*--column messages=chosen"),
        ({"prompt": "a", "completion": "b", "label": True}, "label that says whether it is good.*KTOTrainer"),
    ],
)
def test_rows_of_preferences_are_pointed_to_what_takes_them(row, words):
    with pytest.raises(DataError, match=f"^here:3 has .*{words}"):
        shape_of("here:3", row)
