"""`veneer generate` and `veneer chat`: what is shown is what the models write."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import sys
import termios
import time

import pytest
import torch
from rich.console import Console

from veneer import LoraConfig, PromptTuningConfig
from veneer.errors import ConfigError, DataError
from veneer.inference.generation import Sampling, Writer
from veneer.inference.streaming import Columns, Interrupt, show
from veneer.model.loading import BASE, load

from . import room
from .chat_templates import TEMPLATES
from .forked import veneer
from .test_loading import adapter, bases  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")


@pytest.fixture
def three(bases, tmp_path):  # noqa: F811
    """A base, two LoRAs and a prompt."""
    places = [adapter(bases, tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    return [*places, adapter(bases, tmp_path / "p", PROMPT)]


def by_hand(loaded, ids: list[int], n: int) -> list[int]:
    """Greedy, a whole forward pass for each token."""
    for _ in range(n):
        with torch.no_grad():
            ids = [*ids, int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-n:]


def test_each_answers_as_it_would_alone_in_one_batch(three):
    """Side by side, padded, in a mixed batch: the tokens of a forward pass on the lone row."""
    loaded = load(three)
    writer = Writer(loaded, Sampling(max_new_tokens=5))
    prompts = {name: writer.tokens([{"role": "user", "content": "hello" * (i + 1)}]) for i, name in enumerate("abp")}
    prompts[BASE] = prompts["a"]
    assert writer.together(list(prompts)) == [["a", "b", BASE], ["p"]]
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    answers = show(writer, prompts, console)
    for name, ids in prompts.items():
        with loaded.running(name):
            tokens = by_hand(loaded, ids, 5)
        end = next((i for i, token in enumerate(tokens) if token in writer.stops), 5)
        assert answers[name].text == writer.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        assert answers[name].tokens == end and answers[name].ended == (end < 5)
    assert len({answer.text for answer in answers.values()}) == 4


def test_draws_are_those_of_the_seed_alone(three):
    """Beside others or not, the same seed draws the same answer; another seed another."""
    loaded = load(three[:2])
    said = {}
    for seed in (0, 1):
        writer = Writer(loaded, Sampling(max_new_tokens=8, temperature=1.0, seed=seed))
        assert writer.together(["a", "b"]) == [["a"], ["b"]]
        prompt = writer.tokens([{"role": "user", "content": "hello"}])
        both = show(writer, {"a": prompt, "b": prompt}, Console(file=io.StringIO()))
        alone = show(writer, {"b": prompt}, Console(file=io.StringIO()))
        assert both["b"] == alone["b"]
        said[seed] = alone["b"].text
    assert said[0] != said[1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(temperature=-1.0), "temperature = -1.0 must be 0 or more"),
        (dict(top_p=0.0), "top_p = 0.0 must be above 0"),
        (dict(top_k=5), "top_p and top_k need random sampling"),
        (dict(max_new_tokens=0), "max_new_tokens = 0 must be 1 or more"),
        (dict(repetition_penalty=0.0), "repetition_penalty = 0.0 must be above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        (dict(top_k=1, temperature=2.0), False),
        (dict(top_p=1e-6, temperature=2.0), False),
        (dict(temperature=2.0), True),
    ],
    ids=str,
)
def test_settings_reach_the_model(three, settings, changed):
    """The likeliest of one token is the greedy one."""
    loaded = load(three[:1])
    greedy, other = (
        Writer(loaded, Sampling(max_new_tokens=8, **more)) for more in ({}, settings | {"temperature": 2.0})
    )
    prompt = greedy.tokens([{"role": "user", "content": "hello"}])
    assert (greedy.write(["a"], [prompt]) != other.write(["a"], [prompt])) == changed


def test_an_answer_ends_where_the_template_ends_it(bases):  # noqa: F811
    """Also where neither the model nor the tokenizer calls that token an end."""
    loaded = load(model=str(bases / "one"))
    end = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    loaded.model.generation_config.eos_token_id = 5
    loaded.tokenizer.eos_token = None
    writer = Writer(loaded, Sampling())
    assert writer.stops == {5, end}
    assert Writer(loaded, Sampling(), raw=True).stops == {5}
    answer = writer._answer([7, 8, end, 9])
    assert answer.tokens == 2 and answer.ended


def test_what_is_asked(bases, tmp_path):  # noqa: F811
    loaded = load(model=str(bases / "one"))
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    text = loaded.tokenizer.decode(Writer(loaded, Sampling()).tokens(said))
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    raw = Writer(loaded, Sampling(), raw=True)
    assert loaded.tokenizer.decode(raw.tokens(said[1:])) == "hello"
    with pytest.raises(ConfigError, match="no chat template; give chat_template"):
        raw.tokens(said)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    own = Writer(loaded, Sampling(), template_file=tmp_path / "t.jinja")
    assert loaded.tokenizer.decode(own.tokens(said)) == "<Be brief.><hello>"
    with pytest.raises(
        DataError, match=r"hello: 300 prompt tokens and 10 new tokens exceed the model's maximum of 256"
    ):
        Writer(loaded, Sampling(max_new_tokens=10)).check_room(300, "hello")
    assert TEMPLATES[0].eos == "<|im_end|>"


def test_a_classifier_writes_nothing(bases, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="an adapter for SEQ_CLS cannot generate text"):
        Writer(load([adapter(bases, tmp_path / "c", classes=3)]), Sampling())


def test_columns_stand_side_by_side_where_there_is_room(bases):  # noqa: F811
    words = load(model=str(bases / "one")).tokenizer
    for width, lines in ((80, 3), (50, 6)):
        console = Console(file=io.StringIO(), force_terminal=True, width=width)
        columns = Columns(["one", "two"], words, {2}, console)
        columns.tokens = {name: words(f"{name} says").input_ids for name in ("one", "two")}
        console.print(columns)
        shown = console.file.getvalue()
        assert "one says" in shown and "two says" in shown and len(shown.splitlines()) == lines


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def test_generate_takes_a_prompt_from_three_places(three, tmp_path):
    few = ["--adapter", three[0], "--max-new-tokens", "6"]
    said = veneer("generate", "hello there", *few)
    assert said.returncode == 0 and said.stdout.strip(), said.stderr
    assert veneer("generate", *few, given="hello there\n").stdout == said.stdout
    (tmp_path / "prompt.txt").write_text("hello there\n")
    assert veneer("generate", "--file", str(tmp_path / "prompt.txt"), *few).stdout == said.stdout
    assert veneer("generate", "hello", "--file", "x", *few).stderr.startswith("error: there are two prompts")
    assert "the prompt is empty" in veneer("generate", *few, given="\n").stderr


def test_generate_shows_several_and_says_so_in_json(three):
    several = [word for place in three for word in ("--adapter", place)] + ["--max-new-tokens", "4"]
    found = json.loads(veneer("generate", "hello", *several, "--compare", "--json").stdout)
    assert [answer["name"] for answer in found["answers"]] == ["base", "a", "b", "p"]
    assert found["prompt"] == "hello" and found["settings"]["temperature"] == 0
    shown = veneer("generate", "hello", *several).stdout
    assert [line for line in shown.splitlines() if line.startswith("== ")] == ["== a ==", "== b ==", "== p =="]
    for answer in found["answers"][1:]:
        assert answer["text"].split("\n")[0] in shown


TALK = """hello
/adapter b
hello
/adapter nobody
/nonsense
/reset
/compare
hello
/quit
not any more
"""


def test_chat_works_when_piped(three):
    done = veneer("chat", "--adapter", three[0], "--adapter", three[1], "--max-new-tokens", "4", given=TALK)
    assert done.returncode == 0, done.stderr
    headings = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert headings == ["== a ==", "== b ==", "== base ==", "== a ==", "== b =="]
    assert "there is no model or adapter called 'nobody'; there are base, a, b" in done.stdout
    assert "there is no command /nonsense" in done.stdout


def test_chat_remembers_what_was_said(three, monkeypatch):
    """Each model sees its own earlier answers, and another's where it has none."""
    from veneer.inference.generation import Conversation

    loaded = load(three[:2])
    talk = Conversation(Writer(loaded, Sampling(max_new_tokens=3)), "Be brief.")
    talk.add("one?", {"a": "A1"})
    talk.add("two?", {"a": "A2", "b": "B2"})
    said = [message["content"] for message in talk.messages("b", "three?")]
    assert said == ["Be brief.", "one?", "A1", "two?", "B2", "three?"]
    assert [message["content"] for message in talk.messages("a", "three?")][4] == "A2"
    assert [message["content"] for message in talk.messages(BASE, "three?")][2] == "A1"
    talk.reset()
    assert [message["role"] for message in talk.messages("a", "x")] == ["system", "user"]


def test_ctrl_c_ends_the_answer():
    interrupt = Interrupt()
    ids = torch.zeros(2, 3, dtype=torch.long)
    with interrupt.listening() as criteria:
        assert not criteria(ids, None).any()
        os.kill(os.getpid(), signal.SIGINT)
        assert criteria(ids, None).all()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, "-m", "veneer", *arguments], environment())
        self.seen = ""

    def until(self, text: str, press: str = "") -> str:
        """What is shown, up to the next `text`.

        press: a key to press until then, again and again: Python loses a signal that comes just before `input` waits.
        """
        end = time.monotonic() + room.SECONDS
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            self.type(press)
            if select.select([self.file], [], [], 1.0 if press else 0.2)[0]:
                self.seen += os.read(self.file, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def edits(self) -> None:
        """Wait until the line editor reads: what is typed before it has taken the terminal over is lost."""
        room.until(lambda: not termios.tcgetattr(self.file)[3] & termios.ICANON, "the line editor")

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())


def test_chat_on_a_terminal_survives_ctrl_c(bases, tmp_path):  # noqa: F811
    """In an answer it stops the answer; at the prompt it says how to leave."""
    config = LoraConfig(r=2, task_type="CAUSAL_LM")
    place = adapter(bases, tmp_path / "a", config)
    terminal = Terminal("chat", "--adapter", place, "--max-new-tokens", "100000")
    try:
        terminal.until("> ")
        terminal.edits()
        terminal.type("hello\r")
        terminal.until("maximum of 256")  # no room for so long an answer; the talk goes on
        terminal.until("> ")
        terminal.until("/quit", press="\x03")
        terminal.until("> ")
        terminal.edits()
        terminal.type("/quit\r")
        assert os.waitpid(terminal.pid, 0)[1] == 0
    finally:
        os.close(terminal.file)
