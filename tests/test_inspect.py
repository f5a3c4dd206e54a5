"""`inspect` and `diff`: what they say is true, and no file makes them fall."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from veneer import LoraConfig, get_peft_model
from veneer.errors import CheckpointError
from veneer.maths.low_rank import effective_rank
from veneer.report.comparison import diff
from veneer.report.inspection import inspect, printable
from veneer.targets.walk import by_number

from . import models
from .cases import ONE_EACH, Case
from .forked import veneer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter(tmp_path) -> Path:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2})
    model = models.perturb(get_peft_model(models.build("llama"), config))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_lora_is_described(adapter):
    found = inspect(adapter)
    tensors = load_file(adapter / WEIGHTS)
    assert found.method == "LORA" and found.settings["r"] == 3
    assert found.count == sum(t.numel() for t in tensors.values())
    assert found.file_bytes == (adapter / WEIGHTS).stat().st_size
    layer = next(x for x in found.layers if x.path == "model.layers.1.mlp.down_proj")
    A, B = (tensors[f"base_model.model.{layer.path}.lora_{side}.weight"].double() for side in "AB")
    S = torch.linalg.svdvals(5 / 2 * B @ A)
    assert layer.rank == 2 and layer.norm == pytest.approx(float(S.norm()), rel=1e-5)
    p = S[:2] / S[:2].sum()
    assert layer.effective_rank == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-5)
    assert found.problems == ["the config does not name the base model"]


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_every_method_is_described(case: Case, tmp_path):
    case.build().save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found.method == case.config().peft_type and found.count > 0
    assert not [p for p in found.problems if "cannot" in p or "finite" in p or "PEFT's" in p]


def test_effective_rank():
    assert effective_rank(torch.ones(4)) == pytest.approx(4)
    assert effective_rank(torch.tensor([2.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


def rewrite(adapter: Path, change) -> None:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)


def first(tensors: dict) -> str:
    return next(key for key in sorted(tensors) if "lora_B" in key)


FAULTS = {
    "not finite": lambda t: t[first(t)].__setitem__((0, 0), float("nan")),
    "all zero": lambda t: t[first(t)].zero_(),
    "other half": lambda t: t.pop(first(t)),
    "rank 1 in the file": lambda t: [t.update({k: v[:1] if "_A" in k else v[:, :1].clone()}) for k, v in t.items()],
    "keys are not in PEFT's layout": lambda t: t.update({"strange": torch.ones(2)}),
    "the file has no tensor for q_proj": lambda t: [t.pop(k) for k in list(t) if "q_proj" in k],
}


@pytest.mark.parametrize("told", FAULTS)
def test_faults_are_told(adapter, told):
    rewrite(adapter, FAULTS[told])
    assert any(told in problem for problem in inspect(adapter).problems)


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


HOSTILE = {
    "empty": b"",
    "short": b"\x01\x02",
    "endless header": struct.pack("<Q", 2**62) + b"{}",
    "deep header": header(b"[" * 100_000),
    "no json": header(b"\xff" * 64),
    "beyond the end": header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}') + b"\0" * 8,
    "overlap": header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    ) + b"\0" * 4,
    "overflow": header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}') + b"\0" * 4,
    "negative": header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}') + b"\0" * 4,
    "unknown dtype": header(b'{"a":{"dtype":"Q7","shape":[1],"data_offsets":[0,4]}}') + b"\0" * 4,
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tensor_files_are_survived(adapter, name):
    (adapter / WEIGHTS).write_bytes(HOSTILE[name])
    assert any(problem.startswith(f"{WEIGHTS} cannot be read") for problem in inspect(adapter).problems)


@pytest.mark.parametrize("size", range(0, 2000, 97))
def test_a_file_cut_anywhere_is_survived(adapter, size):
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:size])
    assert inspect(adapter).problems


CONFIGS = {
    "no json": b"{",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "bytes": b"\xff\xfe",
    "unhashable method": b'{"peft_type": ["LORA"]}',
    "no method": b'{"peft_type": "../../etc"}',
    "wrong types": b'{"peft_type": "LORA", "r": {"a": 1}, "target_modules": 7}',
    "huge rank": b'{"peft_type": "LORA", "r": 1e400}',
    "bad pattern": b'{"peft_type": "LORA", "target_modules": "(((("}',
    "endless": b'{"peft_type": "' + b"A" * 11_000_000 + b'"}',
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configs_are_survived(adapter, name):
    (adapter / CONFIG).write_bytes(CONFIGS[name])
    found = inspect(adapter)
    assert any(problem.startswith(f"{CONFIG} cannot be used") for problem in found.problems)
    assert found.tensors and all(len(problem) < 500 for problem in found.problems)


def test_nothing_from_a_file_steers_the_terminal(adapter):
    rewrite(adapter, lambda t: t.update({"\x1b[2J\x07[red]x[/nope]": torch.ones(2)}))
    done = veneer("inspect", str(adapter), "--tensors")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "\\x1b[2J\\x07[red]x[/nope]" in done.stdout
    assert printable("a\nb\x9b\u202e") == "a\\nb\\x9b\\u202e"


def test_a_pickle_is_named_and_left_alone(adapter):
    os.rename(adapter / WEIGHTS, adapter / "adapter_model.bin")
    assert "is a pickle and was not read" in inspect(adapter).problems[-1]


def test_a_directory_without_an_adapter_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="holds no adapter"):
        inspect(tmp_path)


def test_the_command(adapter):
    shown = veneer("inspect", str(adapter), COLUMNS="140")
    assert "LORA" in shown.stdout and "model.layers.0.self_attn.q_proj" in shown.stdout
    found = json.loads(veneer("inspect", str(adapter), "--json").stdout)
    assert len(found["layers"]) == 4 and found["count"]


def test_diff_of_the_same_is_none_and_of_others_tells(adapter, tmp_path):
    assert diff(adapter, adapter).is_none
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "o_proj"])
    models.perturb(get_peft_model(models.build("llama"), config)).save_pretrained(tmp_path / "other")
    found = diff(adapter, tmp_path / "other")
    assert found.fields["lora_alpha"] == (5, 7)
    assert len(found.only_first) == 4 and all("down_proj" in key for key in found.only_first)
    assert len(found.only_second) == 4 and len(found.angles) == 2


def test_the_angle_between_updates(adapter, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    rewrite(other, lambda t: t.update({k: -2 * v if "lora_B" in k else v for k, v in t.items()}))
    found = diff(adapter, other)
    assert all(a.cosine == pytest.approx(-1) and a.norms[1] == pytest.approx(2 * a.norms[0]) for a in found.angles)
    assert len(found.angles) == 4 and all(t.relative == pytest.approx(3) for t in found.changed) and found.same == 4
    done = veneer("diff", str(adapter), str(other))
    assert done.returncode == 1 and "cosine -1.000" in done.stdout
    assert veneer("diff", str(adapter), str(adapter)).returncode == 0


@pytest.fixture
def deep(tmp_path) -> Path:
    """An adapter of twelve layers."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], base_model_name_or_path="base")
    sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=12, vocab_size=16)
    model = models.perturb(get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), config))
    model.save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


def test_layers_are_in_the_order_of_their_numbers(deep, tmp_path):
    paths = [layer.path for layer in inspect(deep).layers]
    assert paths == [f"model.layers.{i}.self_attn.{name}_proj" for i in range(12) for name in "qv"]
    keys = [tensor.key for tensor in inspect(deep).tensors]
    assert keys == [f"base_model.model.{path}.lora_{side}.weight" for path in paths for side in "AB"]
    other = tmp_path / "other"
    shutil.copytree(deep, other)
    rewrite(other, lambda t: t.update({key: v + 1 for key, v in t.items()}))
    assert [angle.path for angle in diff(deep, other).angles] == paths
    assert [tensor.key for tensor in diff(deep, other).changed] == keys
    rewrite(other, dict.clear)
    assert diff(deep, other).only_first == keys


def test_numbers_of_any_length_are_ordered():
    names = ["a.10", "a.9", "a.09", "a." + "9" * 6000, "a", "b.1", "1.a", "٣.a"]
    assert sorted(names, key=by_number) == ["1.a", "a", "a.09", "a.9", "a.10", "a." + "9" * 6000, "b.1", "٣.a"]


def test_both_begin_with_a_summary(deep, tmp_path):
    shown = veneer("inspect", str(deep), COLUMNS="140").stdout.splitlines()
    head = shown[: shown.index("")]
    assert "modules   24: 12 q_proj, 12 v_proj" in head and "no problems found" in head
    assert "parts     lora_A, lora_B" in head
    rows = veneer("inspect", str(deep), COLUMNS="80").stdout.splitlines()
    assert any(re.match(r"model\.layers\.11\.self_attn\.v_proj +32 +2 +[\d.]+ +[\d.]+ *$", row) for row in rows)
    norms = {layer.path: layer.norm for layer in inspect(deep).layers}
    low, high = min(norms, key=norms.get), max(norms, key=norms.get)
    assert f"updates   norm {norms[low]:.3g} ({low}) to {norms[high]:.3g} ({high})" in head
    assert any(line.startswith("rank      2, effective rank ") for line in head)
    other = tmp_path / "other"
    shutil.copytree(deep, other)
    rewrite(other, lambda t: t.update({k: -v for k, v in t.items() if "lora_B" in k and ".10." not in k}))
    compared = veneer("diff", str(deep), str(other)).stdout.splitlines()
    assert compared[:2] == ["settings  equal", "tensors   26 equal, 22 changed"]
    assert compared[2] == "updates   24 compared, cosine mean -0.833, lowest -1.000, highest +1.000"
    assert compared[3] == "" and len(compared) == 4 + 22 + 24
    assert "all 48 tensors" in veneer("diff", str(deep), str(deep)).stdout
