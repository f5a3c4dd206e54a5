"""Make the pictures of the site: `python docs/pictures.py` (ten minutes, CPU; needs pyte and chromium).

Everything shown is real: the commands run in a temporary directory on SmolLM2-135M-Instruct, terminals are recorded as
SVG, and Chromium takes the screenshots of the report. Names as arguments make only those pictures; the runs that they
show are kept in the directory VENEER_PICTURES, if it is set.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyte
from PIL import Image
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

DOCS = Path(__file__).parent
ROOT = DOCS.parent
OUT = DOCS / "img"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

DATA = "examples/data/reminders-train.jsonl"
HELD_OUT = "examples/data/reminders-heldout.jsonl"
MY_ADAPTER = (
    f"veneer train --model smollm2-135m-instruct --data {DATA} --eval-data {HELD_OUT} --output my-adapter "
    "--max-steps 30 --learning-rate 2e-3 --set samples=6"
)
OTHER_ADAPTER = (
    f"veneer train --model smollm2-135m-instruct --data {DATA} --output other-adapter --method dora --max-steps 4"
)
PLAN = f"veneer plan --model smollm2-135m-instruct --targets all-linear --rank 8 --data {DATA}"
EVAL = f"veneer eval --adapter my-adapter --data {HELD_OUT} --exact --max-new-tokens 48"
GENERATE = (
    'veneer generate "Remind me to sand the bookshelf on Saturday" --adapter my-adapter --compare --max-new-tokens 48'
)
COMBINE = (
    "veneer combine my-adapter other-adapter --weights 0.7,0.3 --out both && "
    'veneer generate "Call the optician tomorrow at 10" --adapter my-adapter --adapter both --compare'
    " --max-new-tokens 40"
)
DOCTOR = "veneer doctor other-adapter --for vllm"
COUNT = """
from transformers import AutoModelForCausalLM
from veneer import LoraConfig, TaskType, get_peft_model, pull
base = AutoModelForCausalLM.from_pretrained(pull("smollm2-135m-instruct"))
config = LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
print(get_peft_model(base, config).parameter_plan())
"""


def typed(command: str, most: int = 76) -> str:
    """A command as one types it, on several lines if it is long."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if len(lines[-1]) + len(part) > most:
            lines[-1] += " \\"
            lines.append(f"  {part}")
        else:
            lines[-1] += f" {part}" if lines[-1] else part
    return "\n".join(lines)


@dataclass(frozen=True)
class Screen:
    """A picture of a terminal."""

    command: str
    """What is run; each part of A && B has a prompt of its own."""
    after: tuple[str, ...] = ()
    """Runs that it needs, each done once."""
    shown: str | None = None
    """What the prompt shows, if it is not the command."""
    columns: int = 96
    last: int | None = None
    """Show only this many lines from the end."""


SCREENS = {
    "train": Screen("cat my-adapter.log", (MY_ADAPTER,), shown=MY_ADAPTER.replace(" --set samples=6", ""), last=12),
    "tutorial": Screen(f"python -c {shlex.quote(COUNT)}", shown=">>> print(model.parameter_plan())", last=8),
    "plan": Screen(PLAN),
    "eval": Screen(EVAL, (MY_ADAPTER,)),
    "generate": Screen(GENERATE, (MY_ADAPTER,)),
    "combine": Screen(COMBINE, (MY_ADAPTER, OTHER_ADAPTER)),
    "doctor": Screen(DOCTOR, (OTHER_ADAPTER,)),
}

THEME = TerminalTheme(
    (32, 29, 25),
    (236, 230, 220),
    [(32, 29, 25), (255, 138, 128), (127, 206, 143), (235, 203, 92), (130, 170, 255), (220, 150, 220), (92, 199, 180)]
    + [(210, 203, 192)],
    [(162, 152, 138), (255, 138, 128), (127, 206, 143), (235, 203, 92), (130, 170, 255), (220, 150, 220)]
    + [(92, 199, 180), (255, 255, 255)],
)
FONT = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"


def main(names: list[str]) -> None:
    kept = os.environ.get("VENEER_PICTURES")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(kept or temporary)
        place.mkdir(exist_ok=True)
        if not (place / "examples").exists():
            (place / "examples").symlink_to(ROOT / "examples")
        for name, screen in SCREENS.items():
            if not names or name in names:
                terminal(name, screen, place)
        if not names or "report" in names:
            report(place)


# Terminals


def terminal(name: str, screen: Screen, place: Path) -> None:
    """Record what a command prints as docs/img/NAME.svg."""
    for command in screen.after:
        need(command, place)
    for result in re.findall(r"--out (\S+)", screen.command):
        shutil.rmtree(place / result, ignore_errors=True)
    lines = []
    for command in screen.command.split(" && "):
        printed = displayed(run(command, place, screen.columns), screen.columns)
        if screen.last:
            printed = printed[-screen.last :]
        lines += [*prompt(screen.shown or command), *printed]
    if any(str(Path.home()) in line.plain for line in lines):
        raise SystemExit(f"{name}: the picture shows a path of this machine")
    width = max(len(line) for line in lines) + 1
    console = Console(record=True, width=width, file=io.StringIO(), color_system="truecolor", legacy_windows=False)
    for line in lines:
        console.print(line, no_wrap=True)
    svg = console.export_svg(title="", theme=THEME, code_format=svg_format(), unique_id=name)
    (OUT / f"{name}.svg").write_text(small(svg), encoding="utf-8")
    print(f"{name}.svg: {len(lines)} lines")


def prompt(command: str) -> list[Text]:
    """The lines of a command as one types it."""
    if command.startswith(">>>"):
        return [Text(command, "bold")]
    return [Text(line, "bold") for line in f"$ {typed(command)}".split("\n")]


def svg_format() -> str:
    """rich's SVG without its fonts, which would be fetched from elsewhere."""
    text = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return text.replace("Fira Code, monospace", FONT).replace("font-family: arial;", f"font-family: {FONT};")


def small(svg: str) -> str:
    """An SVG without trailing blanks."""
    return "\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n"


def need(command: str, place: Path) -> None:
    """Run a training unless its result is there; what it printed is in NAME.log."""
    name = command.split("--output ")[1].split()[0]
    if not (place / name / "report.html").exists():
        (place / f"{name}.log").write_bytes(run(command, place, 96, shows_progress=True))


def run(command: str, place: Path, columns: int, shows_progress: bool = False) -> bytes:
    """What a command writes to a terminal; its standard error, which shows the progress, only on request."""
    ours, theirs = pty.openpty()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"COLUMNS": str(columns), "LINES": "60", "TERM": "xterm-256color", "PATH": path}
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=place,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs if shows_progress else subprocess.PIPE,
        env=os.environ | settings,
    )
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    _, errors = process.communicate()
    if process.returncode and "doctor" not in command:  # doctor's exit status is its finding
        told = errors if errors is not None else b"".join(chunks)
        raise SystemExit(f"{command}: exit status {process.returncode}\n{told.decode()[-2000:]}")
    return b"".join(chunks)


def displayed(output: bytes, columns: int) -> list[Text]:
    """The lines that a terminal shows in the end, after every cursor movement."""
    screen = pyte.Screen(columns, 400)
    screen.set_mode(pyte.modes.LNM)
    pyte.ByteStream(screen).feed(output)
    lines = [_line(screen.buffer[y], columns) for y in range(screen.lines)]
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def _line(cells: dict[int, pyte.screens.Char], columns: int) -> Text:
    text = Text()
    row = [cells[x] for x in range(columns)]
    for style, run_of_cells in groupby(row, _style):
        text.append("".join(cell.data for cell in run_of_cells), style)
    text.rstrip()
    return text


def _style(cell: pyte.screens.Char) -> Style:
    return Style(color=_colour(cell.fg), bold=cell.bold, italic=cell.italics)


def _colour(name: str) -> str | None:
    """rich's name of one of pyte's colours."""
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return name.replace("brown", "yellow").replace("bright", "bright_")


# The report


def report(place: Path) -> None:
    """Screenshots of the run's report, light and dark, and its answers as docs/demo.json."""
    need(MY_ADAPTER, place)
    page = place / "my-adapter" / "report.html"
    content = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    answers = json.dumps({"samples": content["samples"]["rows"]}, indent=1, ensure_ascii=False)
    (DOCS / "demo.json").write_text(answers + "\n", encoding="utf-8")
    for name, scheme in (("dark", 0), ("light", 1)):
        screenshot(page, OUT / f"report-{name}.webp", scheme, width=900, height=815)


def screenshot(page: Path, out: Path, scheme: int, width: int, height: int) -> None:
    """What Chromium shows of a page, as WebP."""
    if CHROMIUM is None:
        raise SystemExit("no Chromium here; Debian's package is called chromium")
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "page.png"
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={place}/profile", f"--blink-settings=preferredColorScheme={scheme}"]
        command += ["--force-device-scale-factor=2", f"--window-size={width},{height}", f"--screenshot={file}"]
        subprocess.run([*command, page.as_uri()], check=True, capture_output=True)
        Image.open(file).convert("RGB").save(out, quality=82, method=6)
    print(f"{out.name}: {out.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
