"""A save that is interrupted leaves the old adapter or the new one, whole; and nothing asks a network on the way."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from veneer import CheckpointError, LoraConfig, PeftModel, get_peft_model
from veneer.core import checkpoint
from veneer.core.config import all_methods

from . import models, room
from .models import output, perturb
from .room import has_worked

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parent.parent
OFFLINE = """
import socket, sys, warnings
warnings.simplefilter("ignore")
asked = []
def refuse(*args, **kwargs):
    asked.append(args)
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
import torch, veneer
from tests import models
from tests.cases import ONE_EACH
from tests.models import output, perturb
home = sys.argv[1]
base = home + "/base"
models.build("llama").save_pretrained(base)
for case in ONE_EACH:
    if case.siblings or case.model not in ("llama", "gpt2"):
        continue
    where = f"{home}/{case}"
    model = case.build()
    model.parameter_plan()
    model.save_pretrained(where)
    loaded = case.load(where)
    output(loaded, case.inputs())
    loaded.load_adapter(where, "again", **case.trust)
    veneer.inspect(where) if hasattr(veneer, "inspect") else None
    try:
        case.load(where).merge_and_unload()
    except veneer.NotMergeable:
        pass
config = veneer.LoraConfig(r=2, task_type="CAUSAL_LM")
from transformers import AutoModelForCausalLM
model = veneer.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
model.save_pretrained(home + "/last")
veneer.AutoPeftModelForCausalLM.from_pretrained(home + "/last").generate(**models.inputs("llama"), max_new_tokens=2)
assert not asked, asked
try:
    veneer.PeftModel.from_pretrained(models.build("llama"), "someone/something")
except veneer.CheckpointError:
    assert asked, "an explicit download must ask, or the block sees nothing"
    print("fine")
"""


def adapted(version: int):
    """Two versions that differ in values and settings."""
    config = LoraConfig(r=3, lora_alpha=[8, 24][version], target_modules=["q_proj", "down_proj"])
    return perturb(get_peft_model(models.build("llama"), config).eval(), seed=version)


def save_for_ever(where: Path) -> None:
    versions = [adapted(0), adapted(1)]
    for i in itertools.count():
        versions[i % 2].save_pretrained(where)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": room.PYTHONPATH, "OMP_NUM_THREADS": "1", **more}


def test_one_adapter_is_one_file_to_the_byte(tmp_path):
    """safetensors itself writes the keys of its metadata in another order each time."""
    model = adapted(0)
    files = set()
    for _ in range(12):
        model.save_pretrained(tmp_path)
        files.add((tmp_path / "adapter_model.safetensors").read_bytes())
    assert len(files) == 1


def test_killed_saves_leave_a_whole_adapter(tmp_path):
    """A process that saves two adapters in turn into one directory, killed at forty random moments."""
    rng, batch = random.Random(0), models.inputs("llama")
    expected = [output(adapted(version), batch) for version in (0, 1)]
    adapted(0).save_pretrained(tmp_path)
    seen = set()
    for _ in range(8):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(tmp_path,))
        process.start()
        for _ in range(5):
            has_worked(process.pid, rng.uniform(0.0, 0.05))
            os.kill(process.pid, signal.SIGSTOP)  # as good as a crash for who looks now
            out = output(PeftModel.from_pretrained(models.build("llama"), tmp_path), batch)
            found = [i for i, logits in enumerate(expected) if torch.equal(out, logits)]
            assert len(found) == 1, "neither the old adapter nor the new one"
            seen.add(found[0])
            os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.join()
    assert seen == {0, 1}
    adapted(1).save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(models.build("llama"), tmp_path), batch), expected[1])


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_crash_between_the_renames_is_mended_by_the_next_load(cut: int, tmp_path, monkeypatch):
    """The new tensors stand beside the old config: what is loaded is the new adapter, not a mixture."""
    rename, calls, batch = os.replace, [], models.inputs("llama")
    adapted(0).save_pretrained(tmp_path)

    def crash(source, target):
        calls.append(target)
        if len(calls) > cut:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        adapted(1).save_pretrained(tmp_path)
    monkeypatch.undo()
    loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path)
    assert torch.equal(output(loaded, batch), output(adapted(int(cut == 2)), batch))


@pytest.mark.parametrize("saves", [1, 2, 3])
def test_a_save_while_one_loads_gives_one_of_the_adapters(saves: int, tmp_path, monkeypatch):
    """Another process saves after the config was read and before the tensors are."""
    read, batch, done = checkpoint.read, models.inputs("llama"), []
    adapted(0).save_pretrained(tmp_path)

    def late(*args, **kwargs):
        for i in range(0 if done else saves):
            done.append(adapted((i + 1) % 2).save_pretrained(tmp_path))
        return read(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "read", late)
    loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path)
    assert torch.equal(output(loaded, batch), output(adapted(saves % 2), batch))


def test_a_config_that_is_not_the_tensors_own_is_refused(tmp_path):
    """By the settings in the tensor file; one that the caller brings is taken."""
    adapted(0).save_pretrained(tmp_path / "0")
    adapted(1).save_pretrained(tmp_path / "1")
    file = "adapter_config.json"
    (tmp_path / "0" / file).write_bytes((tmp_path / "1" / file).read_bytes())
    with pytest.raises(CheckpointError, match="lora_alpha = 24, but 8 when the tensors were written"):
        PeftModel.from_pretrained(models.build("llama"), tmp_path / "0")
    config = LoraConfig.from_pretrained(tmp_path / "0")
    assert (
        PeftModel.from_pretrained(models.build("llama"), tmp_path / "0", config=config).active_peft_config.lora_alpha
        == 24
    )


@pytest.mark.parametrize(
    ("method", "settings", "change"),
    [
        ("lora", dict(modules_to_save=["lm_head"]), dict(modules_to_save=None)),
        ("lora", dict(modules_to_save=["lm_head"]), dict(modules_to_save=[])),
        ("prompt_tuning", dict(modules_to_save=["lm_head"], num_virtual_tokens=3), dict(modules_to_save=None)),
        ("unilora", {}, dict(target_modules=["v_proj"])),
        ("unilora", {}, dict(exclude_modules=["layers.0.self_attn.q_proj"])),
        ("unilora", {}, dict(layers_to_transform=[0])),
    ],
    ids=str,
)
def test_a_config_that_reads_the_tensors_another_way_is_refused(method, settings, change, tmp_path):
    """A head that was trained is no base embedding; the tensors of UniLoRA do not say which targets they are for."""
    base, kind = models.build("llama"), all_methods()[method]
    settings = settings | ({} if method == "prompt_tuning" else dict(target_modules=["q_proj", "v_proj"]))
    get_peft_model(base, kind(**settings)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=f"{next(iter(change))} = .*, but .* when the tensors were written"):
        PeftModel.from_pretrained(models.build("llama"), tmp_path)


def test_with_sockets_blocked_all_but_a_download_works(tmp_path):
    """Every method saved, loaded, planned, merged; base and adapter in one call."""
    env = {k: v for k, v in environment().items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    done = subprocess.run([sys.executable, "-c", OFFLINE, tmp_path], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0 and "fine" in done.stdout, done.stdout + done.stderr[-3000:]
