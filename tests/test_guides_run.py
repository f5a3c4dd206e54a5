"""Every command of the guides runs, in order, as it stands there: on a tiny model, and (slowly) on the real one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from veneer import hub

from . import models
from .chat_templates import TEMPLATES
from .test_train_chat import tokenizer

ROOT = Path(__file__).parent.parent
GUIDES = ["evaluate", "use-an-adapter"]


def commands(guide: str, language: str = "sh") -> str:
    text = (ROOT / "docs" / "guides" / f"{guide}.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory) -> Path:
    """A cache whose SmolLM2 is a tiny Llama."""
    cache = tmp_path_factory.mktemp("cache")
    home = cache / hub.DEFAULT
    words = tokenizer(TEMPLATES[0])
    words.pad_token = "<|im_end|>"
    words.save_pretrained(home)
    torch.manual_seed(0)
    ids = dict(pad_token_id=None, bos_token_id=None, eos_token_id=words.eos_token_id)
    models.llama(vocab_size=len(words), max_position_embeddings=2048, **ids).save_pretrained(home)
    (home / hub.MARKER).write_text(json.dumps({"gguf_sha256": hub.MODELS[hub.DEFAULT].gguf_sha256, "files": {}}))
    return cache


def run(guide: str, where: Path, **environment: str) -> str:
    shutil.copytree(ROOT / "examples" / "data", where / "examples" / "data")
    shim = where / "bin" / "veneer"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m veneer "$@"\n')
    shim.chmod(0o755)
    paths = {"PATH": f"{shim.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (where / "guide.py").write_text(commands(guide, "python"))
    script = f"set -o pipefail\n{commands(guide)}\n{sys.executable} guide.py"
    done = subprocess.run(
        ["bash", "-ec", script],
        cwd=where,
        capture_output=True,
        text=True,
        env=os.environ | paths | environment,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("guide", GUIDES)
def test_the_commands_of_a_guide_run(guide: str, tiny_cache: Path, tmp_path: Path):
    assert run(guide, tmp_path, VENEER_CACHE=str(tiny_cache))


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("VENEER_GUIDES"), reason="takes five minutes; `make guides` runs it")
@pytest.mark.parametrize("guide", GUIDES)
def test_they_run_on_the_real_model(guide: str, tmp_path: Path):
    """And the adapter of the guide is better than its base."""
    shown = run(guide, tmp_path)
    if guide == "evaluate":
        lines = [line for line in shown.splitlines() if "token accuracy" in line]
        losses = {line.split()[0]: float(line.split()[2]) for line in lines[:2]}
        assert losses["my-adapter"] < 0.5 * losses["base"], losses
    else:
        assert '"task":' in shown
