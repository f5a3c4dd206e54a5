"""Exit status 0 means that the adapter on disk works: planted faults end with the reason, and leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from veneer.core import checkpoint
from veneer.core.remainder import TRAINING_NAME
from veneer.errors import TrainingError
from veneer.model.stages import START
from veneer.train import finish, trainer
from veneer.train import run as running
from veneer.train import watch as guards
from veneer.train.recipe import make

from . import room
from .forked import forked, veneer
from .test_train import KILLED, base, data, recipe, run, same, tensors  # noqa: F401 (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore")
WRITTEN = set(running.OURS) - {START, TRAINING_NAME}
"""What a run of LoRA that starts from no other adapter leaves in its directory."""
LEFT = {"checkpoints", "logs", "recipe.yaml"}
"""What a run that failed leaves: enough to go on."""


def fails(words: str, *args, **settings) -> None:
    """The run ends with an error of one line, and nothing of a result is there, hidden or half-written."""
    with pytest.raises(TrainingError, match=words) as raised:
        run(*args, **settings)
    assert "\n" not in str(raised.value)
    out = Path(args[2])
    assert not out.exists() or {path.name for path in out.iterdir()} <= LEFT


def on_write(monkeypatch, change):
    """The adapter's file is written with other tensors than the model's, but for those of checkpoints."""
    true = checkpoint.write

    def write(directory, tensors, *rest):
        if finish.STAGING in str(directory):
            change(tensors)
        true(directory, tensors, *rest)

    monkeypatch.setattr(checkpoint, "write", write)


def test_what_was_trained_is_what_was_verified(base, data, tmp_path):  # noqa: F811
    report = run(base, data, tmp_path / "out", max_steps=4, eval_split=4, samples=2)
    assert report["verified"] is True and [check["passed"] for check in report["verification"]] == [True] * 5
    assert {path.name for path in (tmp_path / "out").iterdir()} == WRITTEN
    assert [set(row) for row in report["samples"]["rows"]] == [
        {"prompt", "expected", "before", "after", "right", "right_before"}
    ] * 2
    questions = {row["question"] for row in map(json.loads, Path(data).read_text().splitlines())}
    assert report["samples"]["held_out"] and {r["prompt"] for r in report["samples"]["rows"]} <= questions
    done = veneer("verify", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checks"] == report["verification"]


def test_layers_are_described_by_their_updates(base, data, tmp_path):  # noqa: F811
    from veneer import AutoPeftModelForCausalLM

    report = run(base, data, tmp_path / "out", max_steps=4)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    for found in report["layers"]:
        layer = model.get_base_model().get_submodule(found["path"])
        D = layer.adapters["default"].delta().detach().double()
        p = torch.linalg.svdvals(D)
        p = p[p > 1e-9 * p[0]] / p.sum()
        assert found["norm"] == pytest.approx(float(D.norm()), rel=1e-4) and found["rank"] == 4
        assert found["relative_norm"] == pytest.approx(float(D.norm() / layer.base_layer.weight.norm()), rel=1e-4)
        assert found["effective_rank"] == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-3)
    assert len(report["layers"]) == 4


def test_the_trained_model_is_gone_before_a_fresh_base_comes(base, data, tmp_path, monkeypatch):  # noqa: F811
    seen, true = [], finish.contents
    monkeypatch.setattr(finish, "contents", lambda r, t, *rest: seen.append(weakref.ref(t.model)) or true(r, t, *rest))
    load = finish.load_base
    monkeypatch.setattr(finish, "load_base", lambda *args: seen.append(seen[0]() is None) or load(*args))
    run(base, data, tmp_path / "out", max_steps=1)
    assert seen[1:] == [True]


# Faults


def scale(tensors):
    tensors[next(key for key in tensors if "lora_B" in key)].mul_(1.5)


def lose(tensors):
    tensors.pop(next(key for key in tensors if "lora_A" in key))


def blank(tensors):
    tensors[next(key for key in tensors if "lora_B" in key)].zero_()


def spoil(tensors):
    tensors[next(key for key in tensors if "lora_B" in key)][0] = float("nan")


@pytest.mark.parametrize(
    ("fault", "words"),
    [(scale, "same outputs"), (lose, "missing"), (blank, "tensors are all zero"), (spoil, "not finite")],
)
def test_a_file_that_is_not_the_model_is_not_kept(base, data, tmp_path, monkeypatch, fault, words):  # noqa: F811
    on_write(monkeypatch, fault)
    fails(f"does not work and was not kept .*{words}", base, data, tmp_path / "out", max_steps=4)


def test_a_head_that_is_not_in_the_file_fails(base, tmp_path, monkeypatch):  # noqa: F811
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"{word} {i},{word}\n" for i in range(6) for word in ("oak", "ash")))
    on_write(monkeypatch, lambda tensors: [tensors.pop(key) for key in list(tensors) if "score" in key])
    fails("score", base, str(rows), tmp_path / "out", max_steps=4)


def test_a_tensor_that_stayed_fails(base, data, tmp_path, monkeypatch):  # noqa: F811
    def on_train_end(self, args, state, control, model=None, **kwargs):
        name = next(iter(self.start))
        with torch.no_grad():
            dict(model.named_parameters())[name].copy_(self.start[name])

    monkeypatch.setattr(guards.Watch, "on_train_end", on_train_end)
    fails("changed: 1 tensors have their initial values", base, data, tmp_path / "out", max_steps=5)


def test_a_tensor_that_no_gradient_has_reached_yet_may_stay(base, data, tmp_path):  # noqa: F811
    report = run(base, data, tmp_path / "out", max_steps=1, samples=0)  # B is zero, so that A gets no gradient
    assert report["verified"] and len(report["unchanged_tensors"]) == 4
    assert all("lora_A" in key for key in report["unchanged_tensors"])


def test_an_optimizer_without_the_adapter_ends_early(base, data, tmp_path, monkeypatch):  # noqa: F811
    steps = []

    def create(self, model=None):
        other = nn.Parameter(torch.zeros(3))
        other.grad = torch.ones(3)
        self.optimizer = torch.optim.SGD([other], lr=1.0)
        self.optimizer.register_step_post_hook(lambda *_: steps.append(1))
        return self.optimizer

    monkeypatch.setattr(trainer.ExactTrainer, "create_optimizer", create)
    fails("no optimizer that made a step holds its parameters", base, data, tmp_path / "out", max_steps=40)
    assert len(steps) == guards.PATIENCE


def test_a_target_that_no_gradient_reaches_ends_at_once(base, data, tmp_path, monkeypatch):  # noqa: F811
    load = running.load_base

    def with_tower(*args):
        model = load(*args)
        model.model.tower = nn.Linear(8, 8)  # as a vision tower stands beside text
        return model

    monkeypatch.setattr(running, "load_base", with_tower)
    settings = dict(targets=["q_proj", "tower"], max_steps=4)
    fails("no gradient reaches 2 of 6 trained tensors, .*tower", base, data, tmp_path / "out", **settings)
    assert not list((tmp_path / "out").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("method", "options"),
    [("p_tuning", {"num_virtual_tokens": 3}), ("prefix_tuning", {"num_virtual_tokens": 3, "prefix_projection": True})],
)
def test_a_method_that_keeps_more_than_its_file_brings_back_its_best_checkpoint(base, data, tmp_path, method, options):  # noqa: F811
    """The training makes it worse after the first evaluation, so that the best checkpoint is not the last one."""
    settings = dict(method=method, rank=None, options=options, max_steps=4, eval_every=1, learning_rate=3.0)
    report = run(base, data, tmp_path / "out", eval_split=4, **settings)
    history = {entry["step"]: entry["loss"] for entry in report["eval"]["history"]}
    best = min(list(history)[1:], key=history.__getitem__)
    assert report["eval"]["step"] == best and report["eval"]["loss"] == history[best] and report["verified"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "probe.safetensors", "report.json"])
def test_a_full_disk_at_the_end_leaves_nothing(base, data, tmp_path, monkeypatch, name):  # noqa: F811
    from veneer.files import write as files

    @contextmanager
    def full(path, true=files.replacing):
        with true(path) as temporary:
            yield temporary
            if finish.STAGING in str(path) and path.name == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module in (files, checkpoint):
        monkeypatch.setattr(module, "replacing", full)
    fails("No space left on device .* continue with --resume", base, data, tmp_path / "out", max_steps=2)
    monkeypatch.undo()
    again = running.train(recipe(base, data, tmp_path / "out", max_steps=2), resume=True, console=Console(quiet=True))
    assert again["verified"] and len(again["losses"]) == 2


def test_a_disk_that_fills_while_it_runs(base, data, tmp_path):  # noqa: F811
    """On a real file system of 150 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, "-m", "veneer", "train", "--model", base, "--data", data, "--output", str(disk / "out")]
    mounted = f"mount -t tmpfs -o size=150k tmpfs {disk} && exec $0 $@ --max-steps 2"
    isolated = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*isolated, f"mount -t tmpfs tmpfs {disk}"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets nobody mount a small disk")
    done = subprocess.run([*isolated, mounted + f"; s=$?; ls {disk}/out; exit $s", *command],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2
    assert set(done.stdout.split()) <= LEFT
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the ") and " could not be written into " in last, last


# Killed


def killed(settings: dict, plant: Callable[[], None]) -> None:
    """The run in a process of its own, which what is planted kills."""

    def doomed() -> None:
        plant()
        running.train(make(settings), console=Console(quiet=True))

    done = forked(doomed)
    assert done.returncode == -signal.SIGKILL, done.stderr


def kill(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(step: int) -> Callable[[], None]:
    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == step:
            kill()

    return lambda: setattr(trainer._Epochs, "on_step_end", on_step_end)


@pytest.mark.parametrize("where", ["at any step", "in verify", "in _publish"])
def test_killed_anywhere_and_resumed_is_as_never_killed(base, data, tmp_path, where):  # noqa: F811
    """At a step that is drawn anew each time, and at the very end; bit for bit."""
    step = random.SystemRandom().randint(1, 19)
    settings = recipe(base, data, tmp_path / "killed", **KILLED)
    killed(settings.model_dump(), kill_at(step) if where == "at any step" else lambda: setattr(finish, where[3:], kill))
    run(base, data, tmp_path / "whole", **KILLED)
    report = running.train(settings, resume=True, console=Console(quiet=True))
    assert same(tmp_path / "whole", tmp_path / "killed"), (where, step)
    assert report["verified"] and {path.name for path in (tmp_path / "killed").iterdir()} == WRITTEN


def test_a_run_that_stopped_early_stays_stopped(base, data, tmp_path):  # noqa: F811
    """Killed after the last step: the resumed run has no step to take."""
    stops = dict(eval_data=data, eval_every=1, early_stopping=2, learning_rate=3.0, schedule="constant", warmup=0)
    settings = recipe(base, data, tmp_path / "killed", epochs=20, **stops)
    killed(settings.model_dump(), lambda: setattr(finish, "verify", kill))
    report = running.train(settings, resume=True, console=Console(quiet=True))
    whole = run(base, data, tmp_path / "whole", epochs=20, **stops)
    assert report["losses"] == whole["losses"] and same(tmp_path / "whole", tmp_path / "killed")


def test_the_saved_recipe_gives_the_same_adapter_again(base, data, tmp_path):  # noqa: F811
    """Bit for bit, in another process."""
    run(base, data, tmp_path / "one", epochs=2, eval_split=4, options={"lora_dropout": 0.1})
    again = ["train", str(tmp_path / "one" / "recipe.yaml"), "--output", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "veneer", *again], capture_output=True, text=True, env=environment, timeout=room.SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "one", tmp_path / "two") and len(tensors(tmp_path / "one")) == 8
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "method", ["prompt_tuning", "prefix_tuning", "bottleneck", "oft", "ln_tuning", "loreft", "vera"]
)
def test_methods_of_every_kind_come_out_verified(base, data, tmp_path, method):  # noqa: F811
    report = run(base, data, tmp_path / "out", method=method, rank=None, max_steps=5, samples=1)
    assert report["verified"] and (report["layers"] or report["outside"])
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loss_shown_is_that_of_the_data(base, data, tmp_path, accumulate):  # noqa: F811
    """Before the first update, every method has the base model's loss; what AdaLoRA adds is shown apart from it."""
    settings = dict(rank=None, max_steps=3, batch_size=2, accumulate=accumulate, samples=0, log_every=1)
    plain = run(base, data, tmp_path / "lora", method="lora", **settings)
    own = run(base, data, tmp_path / "adalora", method="adalora", **settings)
    assert own["history"][0]["loss"] == pytest.approx(plain["history"][0]["loss"], rel=1e-5)
    assert all(0.01 < entry["method_loss"] < 10 for entry in own["history"])
    assert not any("method_loss" in entry for entry in plain["history"])
    assert "adalora also minimises a term of its own" in (tmp_path / "adalora" / "report.html").read_text()
    assert "a term of its own" not in (tmp_path / "lora" / "report.html").read_text()
    together = run(base, data, tmp_path / "every", method="adalora", **{**settings, "log_every": 3})
    for name in ("loss", "method_loss"):
        mean = sum(entry[name] for entry in own["history"]) / 3
        assert together["history"][-1][name] == pytest.approx(mean, rel=1e-5)
