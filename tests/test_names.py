"""Names as people type them: of models, adapters, methods, options and keys; what was meant is found or named."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from veneer.errors import CheckpointError, ConfigError, nearest
from veneer.files import locate as module
from veneer.files.find import find_file
from veneer.files.locate import Place, locate
from veneer.model.loading import load_model, load_tokenizer

from . import room
from .forked import veneer
from .test_train import base, data  # noqa: F401 (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("typed", "candidates", "first"),
    [
        ("lroa", ["glora", "alora", "qalora", "lora", "lora_bias"], "lora"),
        ("smolm2", ["smollm2-135m-instruct", "tiny"], "smollm2-135m-instruct"),
        ("smollm2", ["smollm2-135m-instruct", "tiny"], "smollm2-135m-instruct"),
        ("prefix", ["prefix_tuning", "direft"], "prefix_tuning"),
        ("LoRA", ["qalora", "lora"], "lora"),
    ],
)
def test_the_nearest_name_comes_first(typed, candidates, first):
    assert nearest(typed, candidates).startswith(f"; nearest: {first}")
    assert nearest("zzz", candidates) == ""


# Models


@pytest.fixture
def online(monkeypatch):
    """No HF_HUB_OFFLINE, and no network: each question to the hub is counted and fails."""
    import huggingface_hub
    from huggingface_hub import constants

    asked = []

    def refuse(url, **kwargs):
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    module.on_hub.cache_clear()
    yield asked
    module.on_hub.cache_clear()


def test_a_mistyped_model_is_asked_once_and_near_names_are_named(online, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="'smolm2'; nearest: smollm2-135m-instruct; and the hub cannot be reached"):
        load_tokenizer("smolm2")
    assert len(online) == 1
    with pytest.raises(ConfigError, match="'my-modl'; nearest: my-model"):
        locate("my-modl")
    for path in ("./my-modl", str(tmp_path / "my-modl")):
        with pytest.raises(ConfigError, match="no such directory; nearest: .*my-model"):
            locate(path)
    assert len(online) == 2  # a path is no hub id


def test_without_a_network_the_copy_in_the_cache_is_used(online, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    assert locate("some/model") == Place("some/model", only_local=True)
    with pytest.raises(ConfigError, match="nearest: some/model"):
        locate("some/modle")


def test_a_mistyped_adapter_is_asked_once_too(online, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-adapter").mkdir()
    (tmp_path / "my-adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="'my-adaptr'; nearest: my-adapter; and the hub cannot be reached"):
        find_file("my-adaptr", "adapter_config.json")
    assert len(online) == 1


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that has no repository."""

    asked: list[str] = []

    def do_HEAD(self) -> None:
        Hub.asked.append(f"{self.command} {self.path}")
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments) -> None:
        pass


def test_a_hub_that_lacks_the_model_answers_once():
    """A real request, to a server on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "PYTHONPATH": room.PYTHONPATH}
    script = "from veneer.files.locate import locate; locate('some/modle')"
    try:
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    finally:
        server.shutdown()
    assert "and the hub has none of this name" in done.stderr and "no directory 'some/modle'" in done.stderr
    about_the_model = [request for request in Hub.asked if "modle" in request]
    assert about_the_model == ["HEAD /some/modle/resolve/main/config.json"]


# Broken directories


def empty(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def no_tokenizer(directory: Path) -> None:
    for path in directory.glob("token*"):
        path.unlink()


def truncated(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


BROKEN = {
    "empty": (empty, "is empty; give one with a config and weights"),
    "no tokenizer": (no_tokenizer, "has no tokenizer files; copy those of the original model into it"),
    "truncated weights": (truncated, "are damaged: .*model.safetensors.*download or copy them again"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "cannot be loaded: Error no file named"),
    "no config": (lambda d: (d / "config.json").unlink(), "is not a model: it has no config.json. It holds chat_temp"),
    "damaged config": (lambda d: (d / "config.json").write_text("{"), "config.* is not a valid JSON file"),
    "adapter": (lambda d: (d / "config.json").rename(d / "adapter_config.json"), "holds an adapter, not a model"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_directory_is_an_error_of_one_line_with_its_path(base, tmp_path, name):  # noqa: F811
    damage, words = BROKEN[name]
    where = tmp_path / "my model"
    shutil.copytree(base, where)
    damage(where)
    with pytest.raises(ConfigError, match=words) as raised:
        load_tokenizer(str(where))
        load_model(str(where), "AutoModelForCausalLM")
    assert str(where) in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_is_no_model(base):  # noqa: F811
    with pytest.raises(ConfigError, match="is a file; give the directory"):
        load_tokenizer(f"{base}/config.json")


def test_every_verb_says_it(base, tmp_path):  # noqa: F811
    """On one line, with status 2; the directory of a result is not left behind."""
    where = tmp_path / "model"
    shutil.copytree(base, where)
    empty(where)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "a"}) + "\n")
    for arguments in (
        ["train", "--model", str(where), "--data", str(rows), "--output", str(tmp_path / "out")],
        ["plan", "--model", str(where)],
        ["generate", "x", "--model", str(where)],
        ["eval", "--model", str(where), "--data", str(rows)],
        ["methods", "lora", "--model", str(where)],
    ):
        done = veneer(*arguments)
        assert done.returncode == 2, arguments
        assert done.stderr.splitlines() == [
            f"error: the model's directory {str(where)!r} is empty; give one with a config and weights"
        ]
    assert not (tmp_path / "out").exists()


def test_a_mistyped_dataset_is_asked_once(online, tmp_path, monkeypatch):
    from veneer.data.prepare import examples
    from veneer.data.sources import Source
    from veneer.errors import DataError

    module.why_no_dataset.cache_clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(DataError, match="no data file or directory 'rows'; nearest: rows.jsonl, and the hub cannot be"):
        next(iter(examples(Source(path="rows"), "auto")))
    assert len(online) == 1
    module.why_no_dataset.cache_clear()


# Options and verbs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--lr", "1"], "there is no option --lr; here it is --learning-rate"),
        (["train", "--target-modules", "x"], "--targets"),
        (["train", "--lora_alpha", "3"], "here it is --option lora_alpha=VALUE"),
        (["train", "--per-device-train-batch-size", "3"], "here it is --batch-size"),
        (["train", "--lr-scheduler-type", "cosine"], "here it is --schedule"),
        (["train", "--weight-decay", "0.1"], "here it is --set weight_decay=VALUE"),
        (["eval", "--base_model", "x"], "here it is --model"),
        (["merge", "a", "--out-dir", "b"], "here it is --out"),
        (["train", "--epoch", "3"], "there is no option --epoch; nearest: --epochs"),
        (["merge", "a", "--output", "b"], "there is no option --output; here it is --out"),
        (["chat", "--adapters", "a"], "here it is --adapter"),
        (["plan", "--batch-size", "many"], "invalid value for '--batch-size'"),
        (["plan", "--batch-size"], "requires an argument"),
        (["merge", "a"], "missing option '--out'"),
        (["tain"], "there is no command 'tain'; nearest: train"),
        (["--verison"], "there is no option --verison; nearest: --version"),
        (["combine", "a", "b", "--weights", "one,two", "--out", "c"], "--weights 'one,two' must be numbers"),
        (["combine", "a", "b", "--weights", "1", "--out", "c"], "2 adapters and 1 weights"),
        (["combine", "a", "--weights", "1", "--out", "c", "--method", "tie"], "no way to combine called 'tie'"),
        (["combine", "a", "--weights", "1", "--out", "c", "--method", "ties"], "ties needs a density"),
        (["combine", "a", "--weights", "1", "--out", "c", "--rank", "0"], "the result must be at least 1, not 0"),
        (["combine", "a", "--weights", "1", "--out", "c", "--clamp", "2"], "clamp to must be between 0 and 1"),
        (["methods", "qlora"], "QLoRA is lora on a base model whose weights are quantised"),
        (["methods", "lroa"], "there is no method 'lroa'; nearest: lora, "),
        (["train", "--resume", "--overwrite"], "contradict each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_misuse_is_one_line_that_names_what_was_meant(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = veneer(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and words in line, line
    for internal in ("combination_type", "svd_", "majority_sign_method", "Traceback"):
        assert internal not in line
    assert list(tmp_path.iterdir()) == []


def test_every_other_name_of_an_option_leads_to_one():
    import typer

    from veneer.cli import _command, app

    options = set()
    for command in typer.main.get_command(app).commands.values():
        for parameter in command.params:
            options.update(parameter.opts)
    for name, here in _command.OTHER_NAMES.items():
        assert here.partition(" ")[0] in options, name


def test_every_other_name_of_a_key_leads_to_one():
    from veneer.files.recipe import OTHER_KEYS
    from veneer.train.recipe import Recipe

    assert set(OTHER_KEYS.values()) <= set(Recipe.model_fields)
    assert not set(OTHER_KEYS) & set(Recipe.model_fields)


def test_h_is_help():
    for arguments in (["-h"], ["train", "-h"]):
        done = veneer(*arguments)
        assert done.returncode == 0 and "Usage:" in done.stdout and done.stderr == ""


def test_what_convert_refuses_names_the_command_that_does_it(tmp_path):
    """And the command that it names makes a LoRA that can be converted."""
    import veneer as library

    from . import models

    torch.manual_seed(0)
    base_model = models.llama()
    base_model.save_pretrained(tmp_path / "base")
    model = library.get_peft_model(base_model, library.FourierFTConfig(task_type="CAUSAL_LM", n_frequency=9))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "mine")
    done = veneer("convert", str(tmp_path / "mine"), str(tmp_path / "out"), "--to", "mlx")
    assert done.returncode == 2
    command = done.stderr.partition("`veneer ")[2].partition("`")[0]
    words = command.replace("ADAPTER", str(tmp_path / "mine")).replace("DIR", str(tmp_path / "lora")).split()
    extra = ["--model", str(tmp_path / "base")]
    assert veneer(*words, *extra).returncode == 0
    done = veneer("convert", str(tmp_path / "lora"), str(tmp_path / "out"), "--to", "mlx", *extra)
    assert done.returncode == 0, done.stderr
