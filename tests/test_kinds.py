"""Models of many kinds give with adapters what they give on the real PEFT: adapted, reloaded, merged, unmerged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from veneer import LoraConfig, PeftModel, get_peft_model

from . import room
from .peft_kinds import Attention, kinds, methods

pytest.importorskip("peft")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def seen() -> list[dict[tuple[str, str], Any]]:
    def run(library: str) -> dict[tuple[str, str], Any]:
        command = [sys.executable, "-m", "tests.peft_kinds", library]
        environment = {**os.environ, "PYTHONPATH": room.PYTHONPATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        return {(line["kind"], line["method"]): line for line in lines}

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, ("peft", "veneer")))


@pytest.mark.parametrize("kind", kinds())
def test_a_kind_gives_what_peft_gives(kind: str, seen: list[dict[tuple[str, str], Any]]):
    theirs, ours = seen
    for method in methods(kind):
        a, b = theirs[kind, method], ours[kind, method]
        for key in ("keys", "count", "names"):
            assert a[key] == b[key], (method, key)
        for key in ("adapted", "reloaded", "merged", "unmerged", "plain"):
            assert torch.allclose(torch.tensor(a[key]), torch.tensor(b[key]), atol=1e-3), (method, key)
        moved = (torch.tensor(b["adapted"]) - torch.tensor(b["adapted"]).mean()).abs().max()
        assert moved > 0 and torch.allclose(torch.tensor(b["adapted"]), torch.tensor(b["plain"]), atol=1e-3)


def test_default_targets_leave_the_vision_tower_alone():
    make, given, _ = kinds()["llava"]
    model = get_peft_model(make().eval(), LoraConfig(r=2))
    adapted = [row.path for row in model.parameter_plan().rows]
    assert adapted and all("language_model" in path for path in adapted)
    assert model(**given()).logits.isfinite().all()


def test_multihead_attention_takes_an_update_of_both_its_weights(tmp_path: Path):
    """By hand, since PEFT 0.21.2 adds the update of out_proj twice."""
    torch.manual_seed(0)
    base, plain = Attention().eval(), Attention().eval()
    plain.load_state_dict(base.state_dict())
    x = torch.randn(2, 4, 8)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=["mha"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    with torch.no_grad():
        for key, weight in (("", plain.mha.in_proj_weight), ("base_layer.out_proj.", plain.mha.out_proj.weight)):
            A, B = (tensors[f"base_model.model.mha.{key}lora_{side}.weight"] for side in "AB")
            weight += 3 * B @ A
    adapted = model(x)
    assert torch.allclose(adapted, plain(x), atol=1e-5)
    with model.disable_adapter():
        off = model(x)
    before = [p.clone() for p in model.base_model.model.mha.base_layer.parameters()]
    model.merge_adapter()
    assert torch.allclose(model(x), adapted, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(x), off)
    model.unmerge_adapter()
    assert all(map(torch.equal, before, model.base_model.model.mha.base_layer.parameters()))
    torch.manual_seed(0)
    assert torch.allclose(PeftModel.from_pretrained(Attention().eval(), tmp_path)(x), adapted, atol=1e-6)
    adapted.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert torch.allclose(model.merge_and_unload()(x), adapted, atol=1e-5)
