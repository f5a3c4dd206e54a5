"""report.html: one file that needs nothing else, opened in a real browser, narrow and wide, light and dark."""

from __future__ import annotations

import copy
import html
import json
import math
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import regex

from veneer.train import charts, page, samples
from veneer.train.samples import CUT

from . import room
from .chat_templates import TEMPLATES
from .forked import veneer
from .test_train import base, data, run  # noqa: F401 (fixtures)
from .test_train_chat import tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>document.title='run'</script>&<img src=x onerror=alert(1)>"
PROBE = """<script>
const box = e => e.getBoundingClientRect(), all = s => [...document.querySelectorAll(s)];
document.documentElement.dataset.found = JSON.stringify({
  width: innerWidth, scroll: document.documentElement.scrollWidth,
  paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  lines: all(".plot path:not(.rule)").map(e => box(e).width),
  cells: all(".cells i:not(.none)").map(e => [box(e).width, getComputedStyle(e).backgroundColor]),
  outside: all("main *").filter(e => box(e).right > innerWidth + 1 && !e.closest("pre, .said, .scroll")).length,
  small: all("main *").filter(e => parseFloat(getComputedStyle(e).fontSize) < 11).length,
  names: all("details td:first-child").map(e => [e.innerText, box(e).height]),
  text: document.body.innerText, title: document.title, loaded: performance.getEntriesByType("resource").length,
});
</script>"""


@pytest.fixture(scope="module")
def content(base, tmp_path_factory) -> dict:  # noqa: F811
    where = tmp_path_factory.mktemp("page")
    rows = where / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{i} {EVIL}", "answer": f"{i} {EVIL}"}) + "\n" for i in range(12)))
    return run(base, str(rows), where / "my adapter", eval_split=4, eval_every=1, max_length=155, epochs=2, samples=2)


def opened(text: str, where: Path, width: int, dark: bool) -> dict:
    """What a browser makes of the page."""
    file = where / "page.html"
    file.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    settings = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={where / 'profile'}"]
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [CHROMIUM, *settings, scheme, f"--window-size={width},1200", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=room.SECONDS)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; Debian's package is called chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_shows_it(content, tmp_path, width: int, dark: bool):
    found = opened(page.render(content), tmp_path, width, dark)
    assert found["width"] == width >= found["scroll"] and not found["outside"], "it scrolls sideways"
    assert len(found["lines"]) == 6 and min(found["lines"]) > width / 8
    assert len(found["cells"]) == 8 and min(w for w, _ in found["cells"]) > 20
    assert len({colour for _, colour in found["cells"]}) > 2 and not found["small"] and not found["loaded"]
    heights = {name: height for name, height in found["names"]}
    assert heights["transformers"] == heights["torch"], "a word is broken"
    paper, ink = (sum(map(int, re.findall(r"\d+", found[name])[:3])) for name in ("paper", "ink"))
    assert paper + 400 < ink if dark else ink + 400 < paper
    assert found["title"].startswith("Answers learned from rows.jsonl: lora on ") and EVIL in found["text"]
    for words in (f"{content['eval']['loss']:.4f}", "verified", "same outputs", "(kept)", "from_pretrained"):
        assert words in found["text"], words


def test_it_needs_nothing_else_and_runs_nothing(content):
    text = page.render(content)
    assert len(text) < 150_000
    assert not re.search(r"<script|https?:|url\(|@import|<link|<img|onerror=alert\(1\)>", text)
    assert text.count(html.escape(EVIL, quote=True).replace("&#x27;", "&#39;")) >= 2


def test_report_json_is_enough_to_make_it(content):
    saved = Path(content["recipe"]["output"])
    assert page.render(json.loads((saved / "report.json").read_text())) == (saved / "report.html").read_text()


def test_rows_that_were_cut_are_told(content):
    assert content["data"]["cut_rows"] == 12
    assert "12 (" in page.render(content) and 'class="over"' in page.render(content)


def test_a_curve_is_drawn_to_scale():
    drawn = charts.curve("x", "y", [(1, 2.0), (3, 0.0), (5, 1.0)], [(3, 1.0)], floor=0.0)
    top = 1000 * (1 - 1 / (1 + charts.MARGIN))
    assert drawn.lines == (("main", f"M0.0 {top:.1f}L500.0 1000.0L1000.0 {(top + 1000) / 2:.1f}"),)
    assert (drawn.marks[0].x, drawn.marks[0].y) == (50.0, pytest.approx((top + 1000) / 20, abs=0.01))
    assert drawn.y_ticks[0] == (100.0, "0") and drawn.x_ticks[0] == (0.0, "1")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("last", [1, 2, 4, 9, 30, 63, 150, 251, 1999, 12345])
def test_steps_are_whole_numbers_from_the_first_to_the_last(first: int, last: int):
    drawn = charts.curve("x", "y", [(step, 1.0) for step in range(first, last + 1)], floor=0.0)
    marked = [text.replace(",", "") for _, text in drawn.x_ticks]
    assert all(text.isdigit() for text in marked), marked
    steps = [int(text) for text in marked]
    assert steps == sorted(set(steps)) and steps[0] == first and steps[-1] == last and len(steps) <= 9
    places = [place for place, _ in drawn.x_ticks]
    assert places == sorted(places) and all(b - a > 8 for a, b in pairwise(places)), "texts touch"


FALLING = [(step, 0.3 + 3 * math.exp(-step / 4)) for step in range(100)]


def test_a_run_that_is_mostly_flat_has_a_logarithmic_axis():
    drawn = charts.curve("Loss", "y", FALLING, may_be_log=True)
    assert drawn.is_log and [text for _, text in drawn.y_ticks] == ["0.3", "0.5", "1", "2", "3"]
    axis = charts.log_axis([value for _, value in FALLING], charts.MARGIN)
    for place, text in drawn.y_ticks:
        assert place == pytest.approx(100 * (1 - axis.share(float(text))), abs=0.01)
    assert axis.share(axis.start) == 0 and axis.share(axis.end) == 1
    assert axis.share(math.sqrt(axis.start * axis.end)) == pytest.approx(0.5)
    wide = charts.curve("Loss", "y", [(i, 10.0 ** (2 - min(i, 8))) for i in range(30)], may_be_log=True)
    assert wide.is_log and 3 <= len(wide.y_ticks) <= charts.MOST_LOG_TICKS and "1e-4" in dict(wide.y_ticks).values()


@pytest.mark.parametrize(
    "values",
    [[5.6, 5.2, 5.1, 5.1, 5.1], [4.0, 3.0, 2.0, 1.0, 0.5], [3.0, 0.3, 0.0, 0.1, 0.1], [9.0], []],
    ids=["a narrow range", "a straight line", "zero", "one step", "nothing"],
)
def test_other_runs_have_a_linear_axis(values: list):
    assert not charts.curve("Loss", "y", list(enumerate(values)), may_be_log=True).is_log
    assert not charts.curve("Memory", "y", FALLING).is_log


def test_ticks_have_the_digits_that_they_need():
    for end, texts in (
        (1.06, ["0", "0.25", "0.50", "0.75", "1.00"]),
        (101, ["0", "25", "50", "75", "100"]),
        (2.6e-4, ["0", "1e-4", "2e-4"]),
        (10600, ["0", "2,500", "5,000", "7,500", "10,000"]),
    ):
        assert [text for _, text in charts.round_ticks(charts.Axis(0, end), 5)] == texts


def test_long_runs_stay_small():
    line = [(float(i), float(i % 7)) for i in range(100_000)]
    assert len(charts.thinned(line)) == charts.MOST_POINTS
    assert sum(y for _, y in charts.thinned(line)) / charts.MOST_POINTS == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("model.layers.3.mlp.up_proj", ("mlp.up_proj", 3)),
        ("transformer.h.11.attn.c_attn", ("attn.c_attn", 11)),
        ("model.layers.2", ("block", 2)),
        ("lm_head", ("lm_head", None)),
    ],
)
def test_a_layer_has_its_place_on_the_map(path: str, place: tuple):
    assert page._place(path) == place


def test_bars_count_every_row():
    lengths = {str(n): n for n in range(10, 500, 7)}
    found = page.bars(lengths, 400)
    assert len(found["bars"]) <= page.MOST_BARS and found["low"] == 10 and found["high"] >= 493
    counted = sum(int(bar["text"].split(": ")[1].split()[0].replace(",", "")) for bar in found["bars"])
    assert counted == sum(lengths.values()) and [bar["over"] for bar in found["bars"]] == sorted(
        bar["over"] for bar in found["bars"]
    )


def test_the_smoothed_line_does_not_lag():
    """On a straight line it lies on the line, also at the ends, and where the values jump it is half way up."""
    straight = [(x, 2.0 * x) for x in range(101)]
    assert charts.smooth(straight) == [pytest.approx(point) for point in straight]
    step = charts.smooth([(x, float(x > 50)) for x in range(102)])
    assert (step[50][1] + step[51][1]) / 2 == pytest.approx(0.5)
    assert charts.smooth([(1, 3.0)]) == [(1, 3.0)] and charts.smooth([]) == []
    assert all(y == pytest.approx(4.0) for _, y in charts.smooth([(x, 4.0) for x in range(7)]))


@pytest.mark.parametrize("is_log", [False, True])
def test_the_smoothed_line_ends_where_the_loss_is(is_log: bool):
    wave = [(step, value * (1.1 if step % 2 else 0.9)) for step, value in FALLING]
    smoothed = charts.smooth(wave, is_log)
    assert smoothed[-1][1] == pytest.approx(0.3, rel=0.05) and smoothed[0][1] > 2.5
    middle = [abs(s / value - 1) for (_, s), (_, value) in zip(smoothed[30:90], FALLING[30:90], strict=True)]
    assert max(middle) < 0.02, "the noise remains"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"a":1,"b":null}', ['{"a":1,"b":null}']),
        ("[{'a': 1}] \u2026", ["[{'a': 1}] \u2026"]),
        ("def f(x):\n    return x", ["def f(x):\n    return x"]),
        ("SELECT name FROM woods", ["SELECT name FROM woods"]),
        ("int a;\nint b;\nreturn;", ["int a;\nint b;\nreturn;"]),
        ("So:\n```python\nx = 1\n\ny = 2\n```\nDone.", ["x = 1\n\ny = 2"]),
        ("So:\n```\nx = 1 \u2026", ["x = 1 \u2026"]),
        ("[1] a footnote", []),
        ("[the note]", []),
        ("Select a plank, then sand it.\nLet it dry.", []),
        ("- one\n- two", []),
        ("", []),
    ],
)
def test_code_is_told_from_prose(text: str, code: list):
    found = page.pieces(text)
    assert [piece.text for piece in found if piece.is_code] == code
    letters = re.sub(r"```(python)?|\s", "", text)
    assert re.sub(r"\s", "", "".join(piece.text for piece in found)) == letters, "something is lost"


def test_code_is_in_a_fixed_width_font(content):
    changed = copy.deepcopy(content)
    changed["samples"]["rows"][0]["after"] = '{"a":"<b>","c":null}'
    assert "<code>{&#34;a&#34;:&#34;&lt;b&gt;&#34;,<wbr>&#34;c&#34;:null}</code>" in page.render(changed)


def test_answers_are_marked_and_counted(content):
    assert [row["right"] for row in content["samples"]["rows"]] == [False, False] and "0 of 2 match" in page.render(
        content
    )
    changed = copy.deepcopy(content)
    changed["samples"]["rows"][1]["right"] = True
    changed["samples"]["exact_match"] = 0.5
    text = page.render(changed)
    assert "1 of 2 match exactly (50%)" in text and text.count("✓ right") == 1 and text.count("✗ wrong") == 3


def test_what_was_cut_says_so(content):
    assert all(row["expected"].endswith(CUT) for row in content["samples"]["rows"])


def test_the_title_names_the_task(content):
    assert page.task(content) == "Answers learned from rows.jsonl"
    plain = content["data"] | {"supervised_tokens": content["data"]["tokens"] - content["data"]["kept"]}
    assert page.task(content | {"data": plain}) == "Text learned from rows.jsonl"
    assert page.task(content | {"labels": ["oak", "ash"]}) == "Classes (oak, ash) learned from rows.jsonl"
    many = [{"path": f"some/{name}.csv"} for name in "abcdef"]
    assert page.task(content | {"recipe": content["recipe"] | {"data": many}}).endswith(
        "a.csv, b.csv, c.csv and 3 more"
    )


def test_what_it_says_to_run_runs(content, tmp_path):
    """The Python of "Load it", and its commands but chat, as they are on the page; the output's name has blanks."""
    text = html.unescape(re.sub(r"</?wbr>", "", page.render(content)))
    blocks = re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)
    exec(blocks[0], {})
    shown = [shlex.split(line) for block in blocks[1:3] for line in block.splitlines()]
    verbs = {words[1]: words[2:] for words in shown}
    assert all(words[0] == "veneer" for words in shown)
    assert list(verbs) == ["chat", "generate", "merge", "verify", "inspect", "train"]
    output = content["recipe"]["output"]
    assert verbs["chat"] == ["--adapter", output] and verbs["train"][0] == f"{output}/recipe.yaml"
    short = {"generate": ["--max-new-tokens", "4"]}
    for verb in ("generate", "verify", "inspect"):
        done = veneer(verb, *verbs[verb], *short.get(verb, []))
        assert done.returncode == 0, done.stderr
    assert verbs["merge"][-2:] == ["--out", "merged"]
    done = veneer("merge", *verbs["merge"][:-1], str(tmp_path / "merged"))
    assert done.returncode == 0, done.stderr


def test_the_commands_fit_the_run(content):
    def use(**changed) -> list[str]:
        return page.commands(content | changed)[0][1]

    assert [line.split()[1] for line in use(labels=["a", "b"])] == ["eval", "merge"]
    assert [line.split()[1] for line in use(chat_template=False)] == ["generate", "merge"]
    own = use(recipe=content["recipe"] | {"chat_template": "my template.jinja"})
    assert all(line.endswith(" --chat-template 'my template.jinja'") for line in own[:2])
    plain = content["data"] | {"supervised_tokens": content["data"]["tokens"] - content["data"]["kept"]}
    assert use(data=plain)[1].endswith(" --raw")
    prompts = [{"prompt": prompt} for prompt in ("- no option", "two\nlines", "x" * 99, "", "it's short")]
    assert shlex.split(use(samples={"rows": prompts})[1])[2] == "it's short"
    assert shlex.split(use(samples={"rows": prompts[:4]})[1])[2] == "a prompt"


CHARACTERS = "काठ 👨‍👩‍👧 木の葉 e\u0301 🇩🇪 "
"""Several code points each, and several bytes; the tokens of the tests' tokenizer are single bytes."""


def test_a_text_is_never_cut_inside_a_character():
    words = tokenizer(TEMPLATES[0])
    ids = words(CHARACTERS, add_special_tokens=False).input_ids
    graphemes = regex.findall(r"\X", CHARACTERS)
    starts = {"".join(graphemes[:i]) for i in range(len(graphemes) + 1)}
    for position in range(len(ids)):
        for step in (-1, 1):
            place = samples._cut_between(words, ids, position, step, samples.CHARACTER)
            assert words.decode(ids[:place]) in starts and (place - position) * step >= 0
    halves = samples._split(words, {"input_ids": ids, "labels": ids})
    assert not halves.asks and words.decode(halves.prompt) + words.decode(halves.answer) == CHARACTERS
    assert words.decode(halves.answer)[0] == " ", "it begins inside a word"
    for end in range(1, len(ids)):
        cut = samples._cut(words.decode(ids[:end]))
        assert cut.endswith(CUT) and "\ufffd" not in cut and not cut.removesuffix(CUT).endswith("\u200d")
