"""Files made to do harm: nothing of them runs, fills the memory, hangs, or reaches out of its directory."""

from __future__ import annotations

import json
import os
import resource
import struct
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from veneer import CheckpointError, ConfigError, LoraConfig, PeftModel, VeneerError, get_peft_model

from . import models
from .cases import ONE_EACH, Case
from .forked import script
from .models import output, perturb
from .room import at_most

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROOT = Path(__file__).parent.parent
ATTACKS = sorted(p for p in (ROOT / "attacks").glob("*.py") if not p.stem.startswith("_"))


def lora(**settings):
    config = LoraConfig(**dict(r=3, target_modules=["q_proj", "down_proj"]) | settings)
    return perturb(get_peft_model(models.build("llama"), config).eval())


@pytest.fixture
def saved(tmp_path) -> Path:
    lora().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@contextmanager
def memory(more: int = 1 << 31):
    """At most so much more address space than now, so that a fault here does not take the machine with it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda p: p.stem)
def test_attacks_fail(attack: Path):
    """Each script of `attacks/` tries one exploit, and exits with 0 where it failed."""
    done = script(attack)
    assert done.returncode == 0 and "failed" in done.stdout, done.stdout + done.stderr


def test_there_are_attacks():
    assert len(ATTACKS) >= 10


def sizes(case: Case) -> list[str]:
    """The fields of its config that are whole numbers."""
    return [f.name for f in fields(case.config_class) if "int" in str(f.type).replace(" ", "").split("|")[:2]]


@pytest.mark.parametrize("case", [case for case in ONE_EACH if not case.siblings], ids=str)
@pytest.mark.parametrize("size", [10**9, 2**40])
def test_no_size_in_a_config_takes_memory_or_time(case: Case, size: int, tmp_path):
    """Whatever number of a config is absurd, the file is refused (or the number means nothing to a load) at once."""
    model = case.build()
    model.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)  # without notes on the settings
    content = json.loads((tmp_path / CONFIG).read_text())
    for name in sizes(case):
        (tmp_path / CONFIG).write_text(json.dumps(content | {name: size}))
        base = models.build(case.model)
        with at_most(20, name), memory(), suppress(VeneerError):
            PeftModel.from_pretrained(base, tmp_path, **case.trust)


@pytest.mark.parametrize("stated", [2**24, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_larger_than_its_file_is_refused_before_it_is_read(saved, stated: int):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(struct.pack("<Q", stated) + content[8:])
    with memory(1 << 28), pytest.raises(CheckpointError, match=f"declares a header of {stated:,}"):
        PeftModel.from_pretrained(models.build("llama"), saved)


def test_a_header_that_nobody_would_write_is_refused_before_it_is_parsed(saved):
    """Forty megabytes of JSON would take hundreds as objects."""
    head = b'{"__metadata__":{"x":"' + b"x" * 40_000_000 + b'"}}'
    (saved / WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head)
    with pytest.raises(CheckpointError, match="declares a header of"):
        PeftModel.from_pretrained(models.build("llama"), saved)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"peft_type": "LORA", "r": 8, "r": 9}', "the key 'r' occurs twice"),
        (b'{"peft_type": "LORA", "lora_dropout": NaN}', "NaN is not a finite number"),
        (b'{"peft_type": "LORA", "lora_dropout": 1e999}', "1e999 is not a finite number"),
        (b'{"peft_type": "LORA", "r": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b'{"peft_type": "LORA", "x": "' + b"x" * 11_000_000 + b'"}', "bytes, which is too large for a config"),
    ],
    ids=["twice", "nan", "infinite", "digits", "large"],
)
def test_a_config_that_is_no_honest_json_is_refused(saved, content: bytes, said: str):
    (saved / CONFIG).write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        PeftModel.from_pretrained(models.build("llama"), saved)


def test_errors_show_no_control_characters_of_a_file(saved):
    tensors = load_file(saved / WEIGHTS)
    tensors["\x1b[2Jbase_model\x07"] = torch.zeros(2)
    save_file(tensors, saved / WEIGHTS)
    with pytest.raises(CheckpointError) as caught:
        PeftModel.from_pretrained(models.build("llama"), saved)
    assert (
        "x1b[2Jbase_model" in str(caught.value) and "\x1b" not in str(caught.value) and "\x07" not in str(caught.value)
    )


# Pickles


class Bomb:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


def test_a_pickle_is_read_by_name_alone_and_runs_nothing(saved, tmp_path):
    batch, tensors = models.inputs("llama"), load_file(saved / WEIGHTS)
    (saved / WEIGHTS).unlink()
    torch.save(tensors, saved / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        PeftModel.from_pretrained(models.build("llama"), saved)
    model = PeftModel.from_pretrained(models.build("llama"), saved, allow_pickle=True)
    assert torch.equal(output(model, batch), output(lora(), batch))
    model.load_adapter(saved, "second", allow_pickle=True)
    for hostile in (tensors | {"x": Bomb(tmp_path / "ran")}, Bomb(tmp_path / "ran"), [1, 2], {"x": 3}, {1: tensors}):
        torch.save(hostile, saved / "adapter_model.bin")
        with pytest.raises(CheckpointError, match="adapter_model.bin"):
            PeftModel.from_pretrained(models.build("llama"), saved, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_where_both_are_there_the_pickle_is_not_read(saved, tmp_path):
    torch.save(Bomb(tmp_path / "ran"), saved / "adapter_model.bin")
    PeftModel.from_pretrained(models.build("llama"), saved, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


# Paths in configs


@pytest.mark.parametrize("where", ["absolute", "up", "link", "hub"])
@pytest.mark.parametrize("method", ["xlora", "arrow"])
def test_paths_in_a_config_do_not_leave_its_directory(method: str, where: str, tmp_path):
    home, outside = tmp_path / "home", tmp_path / "outside"
    lora().save_pretrained(outside)
    case = next(case for case in ONE_EACH if case.method == method)
    case.build().save_pretrained(home)
    (home / "link").symlink_to(outside)
    path = {"absolute": str(outside), "up": "../outside", "link": "link", "hub": "someone/something"}[where]
    content = json.loads((home / CONFIG).read_text())
    if method == "xlora":
        content["adapters"] = {"0": path, "1": path}
    else:
        content["arrow_config"] |= {"task_adapter_names": [path, path]}
    (home / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="follow_paths=True"):
        PeftModel.from_pretrained(models.build(case.model), home)


def test_experts_inside_an_adapters_directory_need_no_leave(tmp_path, monkeypatch):
    """A directory that holds all it needs may be moved anywhere."""
    home = tmp_path / "home"
    for name in "01":
        lora().save_pretrained(home / "experts" / name)
    config = veneer.XLoraConfig(adapters={n: str(home / "experts" / n) for n in "01"}, task_type="CAUSAL_LM")
    torch.manual_seed(3)
    model = get_peft_model(models.build("llama"), config).eval()
    model.save_pretrained(home)
    content = json.loads((home / CONFIG).read_text())
    (home / CONFIG).write_text(json.dumps(content | {"adapters": {n: f"experts/{n}" for n in "01"}}))
    home.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    loaded, batch = PeftModel.from_pretrained(models.build("llama"), "moved"), models.inputs("llama")
    assert torch.equal(output(loaded, batch), output(model, batch))


# Base embeddings


def test_a_second_adapters_file_does_not_change_the_base(tmp_path):
    """Its base embedding is another; what the first adapter was trained on stays."""
    other = models.build("llama")
    with torch.no_grad():
        other.get_input_embeddings().weight[3] += 1
    get_peft_model(other, LoraConfig(target_modules=["embed_tokens"])).save_pretrained(tmp_path)
    model, batch = lora(), models.inputs("llama")
    before, expected = model.get_input_embeddings().weight.clone(), output(model, batch)
    with pytest.raises(CheckpointError, match="'default' is trained on"):
        model.load_adapter(tmp_path, "second", check_base=False)
    assert torch.equal(model.get_input_embeddings().weight, before) and torch.equal(output(model, batch), expected)


def test_base_embeddings_of_the_only_adapter_go_with_it(tmp_path):
    other = models.build("tied")
    with torch.no_grad():
        other.get_input_embeddings().weight[3] += 1
    get_peft_model(other, LoraConfig(target_modules=["embed_tokens"])).save_pretrained(tmp_path)
    base, batch = models.build("tied"), models.inputs("tied")
    expected = output(models.build("tied"), batch)
    model = PeftModel.from_pretrained(base, tmp_path, check_base=False)
    assert torch.equal(output(model, batch), output(other, batch)) and not torch.equal(output(model, batch), expected)
    bare = model.unload()
    assert torch.equal(output(bare, batch), expected) and bare.lm_head.weight is bare.get_input_embeddings().weight
