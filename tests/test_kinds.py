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

from veneer import LoraConfig, get_peft_model

from .peft_kinds import kinds, methods

pytest.importorskip("peft")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def seen() -> list[dict[tuple[str, str], Any]]:
    def run(library: str) -> dict[tuple[str, str], Any]:
        command = [sys.executable, "-m", "tests.peft_kinds", library]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
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
