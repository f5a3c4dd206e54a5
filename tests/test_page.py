"""report.html: one file that needs nothing else, opened in a real browser, narrow and wide, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from veneer.train import page

from . import room
from .test_train import base, data, run  # noqa: F401 (fixtures)

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
    return run(base, str(rows), where / "out", eval_split=4, eval_every=1, max_length=155, epochs=2, samples=2)


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
    assert len(found["lines"]) == 5 and min(found["lines"]) > width / 8
    assert len(found["cells"]) == 8 and min(w for w, _ in found["cells"]) > 20
    assert len({colour for _, colour in found["cells"]}) > 2 and not found["small"] and not found["loaded"]
    heights = {name: height for name, height in found["names"]}
    assert heights["transformers"] == heights["torch"], "a word is broken"
    paper, ink = (sum(map(int, re.findall(r"\d+", found[name])[:3])) for name in ("paper", "ink"))
    assert paper + 400 < ink if dark else ink + 400 < paper
    assert found["title"].startswith("lora on ") and EVIL in found["text"]
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
    drawn = page.curve("x", [("main", [(1, 2.0), (3, 0.0), (5, 1.0)])], [(3, 1.0)], floor=0.0)
    top = 1000 * (1 - 1 / (1 + page.MARGIN))
    assert drawn.lines == (("main", f"M0.0 {top:.1f}L500.0 1000.0L1000.0 {(top + 1000) / 2:.1f}"),)
    assert (drawn.marks[0].x, drawn.marks[0].y) == (50.0, pytest.approx((top + 1000) / 20, abs=0.01))
    assert drawn.y_ticks[0] == (100.0, "0") and drawn.x_ticks[0] == (0.0, "1")


@pytest.mark.parametrize("steps", [1, 2, 4, 9, 63])
def test_steps_are_marked_by_whole_numbers(steps: int):
    drawn = page.curve("x", [("main", [(step, 1.0 / step) for step in range(1, steps + 1)])], floor=0.0)
    marked = [text for _, text in drawn.x_ticks]
    assert marked and all(text.isdigit() for text in marked) and len(set(marked)) == len(marked)


def test_long_runs_stay_small():
    line = [(float(i), float(i % 7)) for i in range(100_000)]
    assert len(page.thinned(line)) == page.MOST_POINTS
    assert sum(y for _, y in page.thinned(line)) / page.MOST_POINTS == pytest.approx(3.0, abs=0.01)


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
    """In the middle of a straight line it lies on the line, and where the values jump it is half way up."""
    straight = page.smooth([(x, 2.0 * x) for x in range(101)])
    assert straight[50] == pytest.approx((50, 100.0))
    step = page.smooth([(x, float(x > 50)) for x in range(102)])
    assert (step[50][1] + step[51][1]) / 2 == pytest.approx(0.5)
    assert page.smooth([(1, 3.0)]) == [(1, 3.0)]
    assert all(y == pytest.approx(4.0) for _, y in page.smooth([(x, 4.0) for x in range(7)]))
