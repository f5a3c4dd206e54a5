"""The command `veneer`: it answers at once, its results go to stdout, and its errors are one line and a status."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import veneer.cli
from veneer.core.config import all_methods

from . import forked, room

engine = importlib.import_module("veneer.files.pull")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "veneer", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=room.SECONDS)


@pytest.fixture
def pulled(tmp_path: Path) -> Path:
    """A cache that says the default model is complete."""
    home = tmp_path / engine.DEFAULT
    home.mkdir()
    marker = {"gguf_sha256": engine.MODELS[engine.DEFAULT].gguf_sha256, "files": {}}
    (home / engine.MARKER).write_text(json.dumps(marker))
    return home


def test_help_lists_every_verb():
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    verbs = [path.stem for path in Path(veneer.cli.__file__).parent.glob("[a-z]*.py")]
    assert "pull" in verbs
    assert all(verb.replace("_", "-") in done.stdout for verb in verbs)


@pytest.mark.parametrize("arguments", [["--help"], ["pull", "--help"], ["pull", "--list"], ["pull"]], ids=" ".join)
def test_nothing_heavy_is_imported(pulled: Path, arguments: list[str]):
    script = f"""
import sys
from veneer.cli import main
sys.argv = ["veneer", *{arguments!r}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {{"torch", "transformers", "datasets", "numpy", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    environment = os.environ | {"VENEER_CACHE": str(pulled.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=room.SECONDS
    )
    assert done.returncode == 0, done.stderr


def test_version():
    assert run("--version").stdout == f"veneer {veneer.__version__}\n"


def test_pull_prints_the_directory_last(pulled: Path):
    done = run("pull", VENEER_CACHE=str(pulled.parent))
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == str(pulled)


def test_pull_list_names_the_models():
    done = run("pull", "--list")
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(engine.MODELS)


def test_an_error_is_one_line_and_status_2():
    done = run("pull", "no-such-model")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown model 'no-such-model'; the models that can be pulled are: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_traceback_is_there_on_demand():
    done = run("pull", "no-such-model", VENEER_DEBUG="1")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_a_wrong_option_is_status_2_too():
    done = run("pull", "--no-such-option")
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(2, "No such file or directory", "adapter.safetensors"), 2, "error: "),
        (PermissionError("the cache is read-only"), 2, "error: the cache is read-only"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_a_verb_raises_becomes_a_status(monkeypatch: pytest.MonkeyPatch, capsys, error, status: int, shown: str):
    def fail(name: str):
        raise error

    monkeypatch.setattr(sys.modules["veneer.cli.pull"], "fetch", fail)
    monkeypatch.setattr(sys, "argv", ["veneer", "pull"])
    with pytest.raises(SystemExit) as stop:
        veneer.cli.main()
    printed = capsys.readouterr().err
    assert stop.value.code == status
    assert printed.startswith(shown) and len(printed.splitlines()) == 1


def test_methods_lists_every_method_with_its_facts():
    done = forked.veneer("methods", COLUMNS="200")
    assert done.returncode == 0 and done.stderr == ""
    for name in all_methods():
        assert any(line.split()[:1] == [name] for line in done.stdout.splitlines()), name
    assert "W' = W + s B A" in done.stdout and "arXiv:2106.09685" in done.stdout


def test_methods_counts_on_an_architecture_without_a_download():
    done = forked.veneer("methods", "--model-type", "gpt2", "--json", HF_HUB_OFFLINE="1")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert set(rows) == set(all_methods())
    assert rows["lora"]["trainable"] == 294_912
    assert rows["lora"]["low_rank"] and rows["lora"]["mergeable"] and rows["prefix_tuning"]["kinds"] == ["prompt"]
    uncounted = {name for name, row in rows.items() if not row["trainable"]}
    assert uncounted <= UNCOUNTED, "these cannot be put on GPT-2 with example settings"


UNCOUNTED = {"xlora", "arrow", "fusion", "average", "split", "union", "beft", "adamss"}
"""X-LoRA, Arrow, fusion, average and split stand on other adapters, a union on its members, BEFT on value projections
of their own, which GPT-2 lacks, AdaMSS on the weights' values."""


def test_the_page_of_a_method():
    done = forked.veneer("methods", "vera")
    assert (
        done.stdout.startswith("VeRA:") and "r = 256" in done.stdout and "Rank of the shared projections" in done.stdout
    )
    page = json.loads(forked.veneer("methods", "VERA", "--json").stdout)
    assert page["paper"] == "arXiv:2310.11454" and "diag(b) B diag(d) A" in page["formula"]
    assert {field["name"] for field in page["fields"]} >= {"r", "d_initial"}


def test_an_unknown_method_or_architecture_names_the_nearest():
    done = forked.veneer("methods", "verra")
    assert done.returncode == 2 and done.stderr.startswith("error: there is no method 'verra'; nearest: vera")
    done = forked.veneer("methods", "lora", "--model-type", "gpt")
    assert done.returncode == 2 and "gpt2" in done.stderr
    done = forked.veneer("methods", "lora", "--model-type", "gpt2", "--model", "x")
    assert done.returncode == 2 and "either" in done.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize(
    "words", [("doctor",), ("methods",), ("pull", "\u6a21\u578b\u2713")], ids=lambda words: words[0]
)
def test_what_a_terminal_cannot_show_is_replaced(words: tuple[str, ...], encoding: str):
    """Windows' consoles and pipes have encodings of their own; a verb must not end in an error of the codec."""
    command = [sys.executable, "-m", "veneer", *words]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=room.SECONDS)
    assert b"codec" not in done.stderr and b"Traceback" not in done.stderr, done.stderr
    assert done.returncode == (2 if words[0] == "pull" else 0) and (done.stdout or done.stderr)
