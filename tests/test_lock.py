"""Two commands never write into one directory: the second is refused, and a dead process holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.errors import ConfigError, VeneerError
from veneer.files.lock import alone
from veneer.files.write import claimed

from . import room
from .forked import forked, veneer
from .test_train import ROWS, base, data, recipe  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")
HOLD = """
import sys
from pathlib import Path
from veneer.files.lock import alone
directory = Path(sys.argv[1])
with alone(directory):
    directory.mkdir(exist_ok=True)
    print("locked", flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process that holds the lock of a directory until its standard input ends."""

    def __init__(self, directory: Path) -> None:
        command = [sys.executable, "-c", HOLD, str(directory)]
        environment = os.environ | {"PYTHONPATH": room.PYTHONPATH}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "locked\n"

    def __enter__(self) -> subprocess.Popen[str]:
        return self.process

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_directory_in_use_names_the_process(tmp_path):
    with Holder(tmp_path / "out") as holder:
        for _ in range(2):  # being refused takes nothing from the lock
            words = rf"in use by process {holder.pid} \(-c .*out, for \d+ s\)"
            with pytest.raises(VeneerError, match=words), alone(tmp_path / "out"):
                pass
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "out")
        with pytest.raises(VeneerError, match=f"in use by process {holder.pid}"), claimed(link):
            pass
        with alone(tmp_path / "other"):
            pass
        holder.communicate("")
        assert holder.returncode == 0
    assert [path.name for path in tmp_path.iterdir() if "lock" in path.name] == []
    with alone(tmp_path / "out"):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    with Holder(tmp_path / "out") as holder:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert (tmp_path / ".out.lock").exists()
    with alone(tmp_path / "out"):
        pass
    assert not (tmp_path / ".out.lock").exists()


def test_a_directory_whose_parent_is_read_only_has_its_lock_inside(tmp_path, monkeypatch):
    """As a mounted volume; a test that runs as root may write everywhere, so the answer is replaced."""
    (tmp_path / "out").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and real(path, mode))
    with alone(tmp_path / "out"):
        assert (tmp_path / "out" / ".lock").exists() and not (tmp_path / ".out.lock").exists()
    assert list((tmp_path / "out").iterdir()) == []


def test_an_error_leaves_no_empty_directories(tmp_path):
    with pytest.raises(ConfigError), alone(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "b" / "out").mkdir()
        raise ConfigError("wrong")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError), alone(tmp_path / "mine" / "out"):
        (tmp_path / "mine" / "out").mkdir()
        (tmp_path / "mine" / "out" / "checkpoint").touch()
        raise ConfigError("wrong")
    assert (tmp_path / "mine" / "out" / "checkpoint").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--model", "{base}", "--data", "{data}", "--output", "{out}", "--overwrite"),
        ("train", "--model", "{base}", "--data", "{data}", "--output", "{out}", "--resume"),
        ("merge", "{adapter}", "--out", "{out}"),
        ("combine", "{adapter}", "{adapter}", "--weights", "1,1", "--out", "{out}"),
        ("convert", "{adapter}", "{out}", "--to", "mlx"),
    ],
    ids=lambda arguments: " ".join((arguments[0], arguments[-1])),
)
def test_every_verb_that_writes_a_directory_refuses_one_in_use(base, data, tmp_path, arguments):  # noqa: F811
    out = tmp_path / "out"
    with Holder(out) as holder:
        (out / "precious").touch()
        places = dict(base=base, data=data, out=out, adapter=tmp_path / "adapter")
        done = veneer(*(argument.format(**places) for argument in arguments))
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {str(out)!r} is in use by process {holder.pid} (")
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_a_training_run_holds_its_directory(base, data, tmp_path, monkeypatch):  # noqa: F811
    """Until its very end; and a run that is refused its directory deletes nothing of the other's."""
    from veneer.train import run as module

    from .test_train import run

    out = tmp_path / "out"
    true = module.finish
    refused = []

    def other() -> None:
        module.train(recipe(base, data, out, max_steps=1), overwrite=True)

    def look(*arguments):
        refused.append(forked(other).stderr)
        return true(*arguments)

    monkeypatch.setattr(module, "finish", look)
    report = run(base, data, out, max_steps=2)
    assert report["verified"]
    (message,) = refused
    assert f"is in use by process {os.getpid()} (" in message
    assert (out / "adapter_model.safetensors").is_file() and (out / "checkpoints").is_dir()
