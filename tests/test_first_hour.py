"""The first hour with the command line: Ctrl-C, starting again, failed runs, progress and the next command."""

from __future__ import annotations

import io
import os
import signal
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from veneer import terminal
from veneer.errors import TrainingError, VeneerError
from veneer.terminal import showing
from veneer.train import trainer as training
from veneer.train.run import train
from veneer.train.stop import Stop

from .forked import forked, veneer
from .test_train import base, data, recipe, run, same  # noqa: F401 (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore")


def interrupted(monkeypatch, step: int, *args, **settings) -> str:
    """A run in which Ctrl-C is pressed within a step; what it shows."""
    pressed = []
    true = training.ExactTrainer.training_step

    def training_step(self, *rest, **kwargs):
        if self.state.global_step == step - 1 and not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return true(self, *rest, **kwargs)

    shown = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(training.ExactTrainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(*args, **settings), console=Console(file=shown, width=200))
    return shown.getvalue()


@pytest.mark.parametrize("step", [1, 4])
def test_ctrl_c_in_training_writes_a_checkpoint_and_says_how_to_continue(base, data, tmp_path, monkeypatch, step):  # noqa: F811
    settings = dict(max_steps=6, eval_split=4, options={"lora_dropout": 0.1})
    run(base, data, tmp_path / "whole", **settings)
    before = signal.getsignal(signal.SIGINT)
    shown = interrupted(monkeypatch, step, base, data, tmp_path / "out", **settings)
    assert signal.getsignal(signal.SIGINT) is before
    assert f"of step {step}" in shown
    command = shown.splitlines()[-1].split()
    assert command == ["veneer", "train", "--output", str(tmp_path / "out"), "--resume"]
    done = veneer(*command[1:])
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "whole", tmp_path / "out")


def test_a_second_ctrl_c_stops_at_once():
    stop = Stop()
    with pytest.raises(KeyboardInterrupt), stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("the second Ctrl-C did not stop the block")


def test_ctrl_c_that_is_ignored_stays_ignored():
    def body() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Stop().listening():
            os.kill(os.getpid(), signal.SIGINT)

    assert forked(body).returncode == 0


def test_ctrl_c_before_the_first_step_leaves_nothing(base, data, tmp_path, monkeypatch):  # noqa: F811
    from veneer.train.stop import Stop

    def on_train_begin(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Stop, "on_train_begin", on_train_begin)
    with pytest.raises(KeyboardInterrupt):
        run(base, data, tmp_path / "out", max_steps=2, eval_split=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings", [{"targets": ["q_prj"]}, {"method": "lorra"}, {"max_length": 8}, {"eval_split": 24}], ids=str
)
def test_a_failed_run_leaves_no_directory(base, data, tmp_path, settings):  # noqa: F811
    with pytest.raises(VeneerError):
        run(base, data, tmp_path / "new" / "out", **settings)
    assert [path.name for path in tmp_path.iterdir()] == [Path(data).name]


def test_a_run_that_fails_in_its_first_step_leaves_no_directory(base, data, tmp_path, monkeypatch):  # noqa: F811
    def training_step(self, *args, **kwargs):
        raise TrainingError("planted")

    monkeypatch.setattr(training.ExactTrainer, "training_step", training_step)
    with pytest.raises(TrainingError, match="planted"):
        run(base, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_alone_says_resume(base, data, tmp_path):  # noqa: F811
    out = tmp_path / "the out"
    out.mkdir()
    done = veneer("train", "--output", str(out))
    assert done.returncode == 2 and "--resume" not in done.stderr
    recipe(base, data, out).save(out)
    for flags in ([], ["--epochs", "3"]):
        done = veneer("train", "--output", str(out), *flags)
        assert done.returncode == 2 and f"`veneer train --output '{out}' --resume` continues" in done.stderr


def test_the_summary_ends_with_the_next_command(base, data, tmp_path):  # noqa: F811
    done = veneer("train", "--model", base, "--data", data, "--output", str(tmp_path / "out"), "--max-steps", "1")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == f"next       veneer chat --adapter {tmp_path / 'out'}"
    done = veneer(*last.split()[2:], given="hello\n")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("labels", "has_template", "file", "command"),
    [
        (None, True, "t.jinja", "veneer chat --adapter 'my out' --chat-template t.jinja"),
        (None, False, None, "veneer generate \"...\" --adapter 'my out'"),
        (["a", "b"], True, None, "veneer eval --adapter 'my out' --data FILE"),
    ],
)
def test_the_next_command_fits_the_task(labels, has_template, file, command):
    from veneer.cli.train import _next_command

    report = {"labels": labels, "chat_template": has_template, "recipe": {"chat_template": file}}
    assert _next_command("my out", report) == command


# Progress


def test_evaluation_verification_and_samples_show_progress(base, data, tmp_path, monkeypatch):  # noqa: F811
    """On a terminal; each with its count, and evaluation with the time left."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120)
    from rich.progress import Progress

    real = Progress.update
    monkeypatch.setattr(Progress, "update", lambda self, *args, **kwargs: (real(self, *args, **kwargs), self.refresh()))
    train(recipe(base, data, tmp_path / "out", max_steps=2, eval_split=8, eval_batch_size=2), console=console)
    text = shown.getvalue()
    assert "evaluating 2/4  0:0" in text
    for what in ("verifying", "sampling the adapter", "sampling the base model", "measuring updates"):
        assert what in text, what


def test_a_slow_task_shows_lines_where_there_is_no_terminal(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminal, "monotonic", lambda: now[0])
    shown = io.StringIO()
    with showing(Console(file=shown, width=80)) as progress:
        for done in range(5):
            progress("quick", done, 4)
            now[0] += 0.1
        for done in range(101):
            progress("slow", done, 100)
            now[0] += 1.0
        progress("slow", 100, 100)
    lines = shown.getvalue().splitlines()
    assert lines[:2] == ["quick: 4 of 4", "slow: 10 of 100, 1:30 left"] and lines[-1] == "slow: 100 of 100"
    assert len(lines) <= 10


# The demo


def test_the_demo_says_how_to_use_what_it_made():
    import subprocess

    root = Path(__file__).parents[1]
    # `make test` itself may have started this: a make within a make prints its directory too.
    alone = ["make", "--no-print-directory", "--dry-run", "demo"]
    done = subprocess.run(alone, cwd=root, capture_output=True, text=True, check=True)
    output = yaml.safe_load((root / "examples" / "reminders.yaml").read_text())["output"]
    last = done.stdout.splitlines()[-1]
    assert f"veneer chat --adapter {output}" in last and ". .venv/bin/activate" in last
