"""Loss on what the assistant writes, to the byte, under the structures of stock chat templates."""

from __future__ import annotations

from itertools import groupby

import pytest

from veneer.data.encode import IGNORED, Encoder
from veneer.data.shapes import Example
from veneer.errors import ConfigError, DataError

from .chat_templates import TEMPLATES, Stock

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = [
    {"role": "user", "content": "What is <b>7</b> times 6?\n"},
    {"role": "assistant", "content": "<b>42</b>, naïvely. 🙂"},
]
MORE = [{"role": "user", "content": "And 6 + 6?"}, {"role": "assistant", "content": "12, then.\nYes: 12."}]
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"word": "veneer", "deep": True}}}],
}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
LOOKED = [
    {"role": "user", "content": "What is a veneer?"},
    CALL,
    {"role": "tool", "content": "thin wood"},
    {"role": "assistant", "content": "Thin wood."},
]


def tokenizer(stock: Stock, words: tuple[str, ...] = ()):
    """A byte-level tokenizer with the template's special tokens, and tokens of several bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces, merges = list(letters), []
    for word in words:
        shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)[0][0]
        merges += [(shown[:i], shown[i]) for i in range(1, len(shown))]
        pieces += [shown[: i + 1] for i in range(1, len(shown))]
    inner = Tokenizer(models.BPE({p: i for i, p in enumerate(dict.fromkeys(pieces))}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(s, special=True) for s in stock.special])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=stock.eos, bos_token=stock.bos)
    made.chat_template = stock.template
    return made


def learned(encoder: Encoder, messages: list[dict], tools=None) -> list[str]:
    """The text of each run of learned tokens."""
    row = encoder.tokens(Example("here:1", messages, tools))
    runs = groupby(zip(row["input_ids"], row["labels"], strict=True), key=lambda pair: pair[1] != IGNORED)
    return ["".join(encoder.tokenizer.decode([token for token, _ in run])) for own, run in runs if own]


def expected(stock: Stock, messages: list[dict]) -> list[str]:
    return [stock.learned(m, i == len(messages) - 1) for i, m in enumerate(messages) if m["role"] == "assistant"]


@pytest.mark.parametrize("words", [(), ("\n\n", ":\n", " 4", "\n<b", "> ", " 1", ">4")], ids=["bytes", "merged"])
@pytest.mark.parametrize("stock", TEMPLATES, ids=str)
def test_each_turn_is_learned_to_the_byte(stock: Stock, words: tuple[str, ...]):
    encoder = Encoder(tokenizer(stock, words), 4096)
    for messages in (FIRST, FIRST + MORE, FIRST + MORE + FIRST):
        assert learned(encoder, messages) == expected(stock, messages)
        if stock.system:
            assert learned(encoder, [SYSTEM, *messages]) == expected(stock, messages)


@pytest.mark.parametrize("stock", [s for s in TEMPLATES if s.tools], ids=str)
def test_calls_of_tools_are_learned_and_their_results_are_not(stock: Stock):
    encoder = Encoder(tokenizer(stock), 4096)
    assert learned(encoder, LOOKED, TOOLS) == expected(stock, LOOKED)
    assert learned(encoder, LOOKED[:2], TOOLS) == expected(stock, LOOKED[:2])
    after = FIRST + LOOKED
    assert learned(encoder, after, TOOLS) == expected(stock, after)


@pytest.mark.parametrize("name", ["qwen-3", "qwen-3-thinking", "gpt-oss"])
def test_thoughts_are_learned_where_the_template_keeps_them(name: str):
    stock = next(s for s in TEMPLATES if s.name == name)
    thinking = [*FIRST, MORE[0], MORE[1] | {"reasoning_content": "6 + 6 makes 12."}]
    assert learned(Encoder(tokenizer(stock), 4096), thinking) == expected(stock, thinking)


@pytest.mark.parametrize("stock", TEMPLATES, ids=str)
def test_a_cut_row_keeps_the_labels_of_what_is_left(stock: Stock):
    whole = Encoder(tokenizer(stock), 4096).tokens(Example("here:1", FIRST + MORE))
    length = len(whole["input_ids"]) - 5
    encoder = Encoder(tokenizer(stock), length)
    [row] = encoder.encode([Example("here:1", FIRST + MORE)])
    assert row == {name: values[:length] for name, values in whole.items()}
    assert (encoder.account.cut_rows, encoder.account.cut_tokens, encoder.account.examples) == (1, 5, ["here:1"])


def test_a_row_whose_answer_is_cut_off_is_dropped_and_counted():
    stock = TEMPLATES[0]
    encoder = Encoder(tokenizer(stock), 20)
    assert list(encoder.encode([Example("here:1", FIRST)])) == []
    assert (encoder.account.unlearned_rows, encoder.account.kept) == (1, 0)
    dropping = Encoder(tokenizer(stock), 20, long_rows="drop")
    assert list(dropping.encode([Example("here:1", FIRST)])) == []
    assert (dropping.account.too_long_rows, dropping.account.cut_rows) == (1, 0)


def test_all_tokens_on_request():
    row = Encoder(tokenizer(TEMPLATES[0]), 4096, loss_on="all").tokens(Example("here:1", FIRST))
    assert row["labels"] == row["input_ids"]


def test_what_a_template_refuses_is_an_error_of_the_row():
    stock = next(s for s in TEMPLATES if s.name == "mistral-1")
    with pytest.raises(DataError, match="here:1: the chat template refuses.*must alternate"):
        Encoder(tokenizer(stock), 4096).tokens(Example("here:1", FIRST + FIRST[1:]))


def test_a_template_of_ones_own_and_none(tmp_path):
    bare = tokenizer(TEMPLATES[0])
    bare.chat_template = None
    assert learned(Encoder(bare, 4096), FIRST) == [FIRST[1]["content"] + "<|im_end|>"]
    with pytest.raises(ConfigError, match="no chat template; give chat_template"):
        Encoder(bare, 4096).tokens(Example("here:1", FIRST + MORE))
    (tmp_path / "own.jinja").write_text(TEMPLATES[0].template)
    encoder = Encoder(bare, 4096, template_file=str(tmp_path / "own.jinja"))
    assert learned(encoder, FIRST + MORE) == expected(TEMPLATES[0], FIRST + MORE)


def test_text_is_learned_whole_and_ends():
    encoder = Encoder(tokenizer(TEMPLATES[1]), 4096)
    row = encoder.tokens(Example("here:1", text="Oak and ash."))
    assert encoder.tokenizer.decode(row["input_ids"]) == "Oak and ash.<|endoftext|>"
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize("stock", TEMPLATES, ids=str)
def test_many_turns_are_found_where_a_few_are(stock: Stock, monkeypatch):
    """Long conversations are located in a few renderings, and each turn is the one that is found by itself."""
    encoder = Encoder(tokenizer(stock), 100_000)
    messages = [SYSTEM] if stock.system else []
    for number in range(9):
        messages += [{"role": "user", "content": f"What is {number}? "}]
        messages += [{"role": "assistant", "content": f" It is {number}.\n" if number % 2 else "Z7q and x"}]
    quick = encoder.template.render("here:1", messages)
    monkeypatch.setattr("veneer.data.chat.SAMPLED_FROM", 100)
    assert encoder.template.render("here:1", messages) == quick


def test_the_time_of_a_conversation_grows_with_its_turns(monkeypatch):
    encoder = Encoder(tokenizer(TEMPLATES[0]), 100_000)
    calls = []
    text = encoder.template.text
    monkeypatch.setattr(encoder.template, "text", lambda *args, **kwargs: calls.append(1) or text(*args, **kwargs))
    counts = []
    for turns in (10, 100):
        calls.clear()
        encoder.template.render("here:1", FIRST * turns)
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_a_call_of_a_tool_that_the_template_leaves_out_is_refused():
    stock = next(stock for stock in TEMPLATES if not stock.tools)
    with pytest.raises(DataError, match="here:1: the chat template does not write the tool call 'look' of message 2"):
        learned(Encoder(tokenizer(stock), 1000), [LOOKED[0], CALL | {"content": ""}])


def test_a_start_token_is_not_written_twice():
    from tokenizers.processors import TemplateProcessing

    stock = next(stock for stock in TEMPLATES if stock.bos)
    made = tokenizer(stock)
    start = made.bos_token_id
    made._tokenizer.post_processor = TemplateProcessing(single=f"{stock.bos} $A", special_tokens=[(stock.bos, start)])
    encoder = Encoder(made, 1000)
    for text in ("hi", stock.bos + "hi"):
        ids = encoder.tokens(Example("here:1", text=text))["input_ids"]
        assert ids.count(start) == 1 and ids[0] == start


def test_a_row_is_named_once_though_it_is_cut_and_dropped():
    encoder = Encoder(tokenizer(TEMPLATES[0]), 4)
    assert not list(encoder.encode([Example("here:1", FIRST)]))
    assert encoder.account.examples == ["here:1"] and encoder.account.cut_rows == 1
