"""PEFT's clients run their example flows on veneer under the name peft, each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import room

FLOWS = {
    "transformers_adapters": "transformers",
    "trainer_peft_model": "transformers",
    "trl_sft": "trl",
    "trl_dpo": "trl",
    "trl_grpo": "trl",
    "diffusers_lora": "diffusers",
    "sentence_embeddings": "sentence_transformers",
    "accelerate_loop": "accelerate",
    "old_experts": "transformers",
}


@pytest.mark.parametrize("flow", FLOWS)
def test_a_client_runs_from_start_to_a_reloaded_result(flow: str, tmp_path: Path):
    if importlib.util.find_spec(FLOWS[flow]) is None:
        pytest.skip(f"{FLOWS[flow]} is not installed")
    command = [sys.executable, "-m", f"tests.clients.{flow}", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": room.PYTHONPATH, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=room.SECONDS, check=False)
    assert run.returncode == 0 and run.stdout.strip().endswith("done"), run.stderr[-3000:]
