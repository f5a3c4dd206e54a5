"""`verify`: it passes what works, and planted faults fail it with the reason."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer import LoraConfig, VeneerError, get_peft_model
from veneer.model.verify import PROBE_NAME, digests, record, verify

from . import models
from .cases import ONE_EACH, Case
from .forked import veneer

WEIGHTS = "adapter_model.safetensors"


def trained(path, dtype=torch.float32, moved=True, **settings):
    config = LoraConfig(**dict(r=3, target_modules=["q_proj", "down_proj"]) | settings)
    model = get_peft_model(models.build("llama", dtype=dtype), config).eval()
    started = digests(model)
    if moved:
        models.perturb(model)
    model.save_pretrained(path)
    record(model, path, models.inputs("llama"), started)
    return path


def failed(found) -> list[str]:
    return [check.name for check in found.checks if check.passed is False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_works_passes(tmp_path, dtype):
    found = verify(trained(tmp_path, dtype), models.build("llama", dtype=dtype))
    assert found.passed and [check.passed for check in found.checks] == [True] * 5, found.checks
    found.check()


@pytest.mark.parametrize("case", [c for c in ONE_EACH if not c.siblings and c.model in ("llama", "gpt2")], ids=str)
def test_every_method_can_be_verified(case: Case, tmp_path):
    model = case.build(moved=False)
    started = digests(model)
    models.perturb(model).save_pretrained(tmp_path)
    record(model, tmp_path, case.inputs(), started)
    found = verify(tmp_path, models.build(case.model), **case.trust)
    assert started and not [c for c in found.checks if c.passed is False], found.checks


def edit(path, change):
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def scale_one(tensors):
    key = next(k for k in tensors if "lora_B" in k)
    tensors[key] *= 1.5


FAULTS = {
    "same outputs": scale_one,
    "not all zero": lambda tensors: tensors[next(k for k in tensors if "lora_B" in k)].zero_(),
    "loads": lambda tensors: tensors.pop(next(k for k in tensors if "lora_B" in k)),
}


@pytest.mark.parametrize("told", FAULTS)
def test_planted_faults_fail(tmp_path, told):
    trained(tmp_path)
    edit(tmp_path, FAULTS[told])
    found = verify(tmp_path, models.build("llama"))
    assert told in failed(found)
    with pytest.raises(VeneerError, match=told):
        found.check()


def test_a_nan_fails(tmp_path):
    trained(tmp_path)
    edit(tmp_path, lambda t: t[next(iter(t))].fill_(float("nan")))
    assert failed(verify(tmp_path, models.build("llama"))) == ["loads"]


def test_an_adapter_that_did_not_move_fails(tmp_path):
    found = verify(trained(tmp_path, moved=False, init_lora_weights=False), models.build("llama"))
    assert failed(found) == ["changed"] and "8 tensors have their initial values" in found.checks[2].detail


def test_another_base_fails(tmp_path):
    assert failed(verify(trained(tmp_path), models.build("llama", seed=5))) == ["loads"]


@pytest.mark.parametrize(("dtype", "much"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)], ids=str)
def test_a_merge_that_is_not_the_adapter_fails(tmp_path, dtype, much, monkeypatch):
    from veneer.methods.lora import LoRA

    true = LoRA.fold
    monkeypatch.setattr(LoRA, "fold", lambda self, W, b: true(self, W + much * self.delta(), b))
    assert failed(verify(trained(tmp_path, dtype), models.build("llama", dtype=dtype))) == ["merges"]


def test_a_file_without_the_head_fails(tmp_path):
    config = LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS")
    model = get_peft_model(models.build("bert"), config).eval()
    started = digests(model)
    assert any("classifier" in key for key in started)
    models.perturb(model).save_pretrained(tmp_path)
    record(model, tmp_path, models.inputs("bert"), started)
    assert verify(tmp_path, models.build("bert")).passed
    edit(tmp_path, lambda t: [t.pop(k) for k in list(t) if "classifier" in k])
    assert failed(verify(tmp_path, models.build("bert"))) == ["loads"]


def test_without_a_record_the_rest_is_checked(tmp_path):
    (trained(tmp_path) / PROBE_NAME).unlink()
    assert [c.passed for c in verify(tmp_path, models.build("llama")).checks] == [True, True, None, None, True]


def test_the_command(tmp_path):
    base = tmp_path / "base"
    models.build("llama").save_pretrained(base)
    trained(tmp_path / "adapter")
    command = ["verify", str(tmp_path / "adapter"), "--model", str(base)]
    done = veneer(*command, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["passed"], done.stderr
    edit(tmp_path / "adapter", scale_one)
    done = veneer(*command)
    assert done.returncode == 2 and "FAILED same outputs" in done.stdout
    assert done.stderr.startswith("error: the adapter in ") and len(done.stderr.splitlines()) == 1
