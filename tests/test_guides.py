"""Every command and every line of Python in the guides to deployment and to many adapters runs, on a tiny model."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from veneer import LoraConfig, get_peft_model
from veneer.cli import app

from . import models
from .gguf_models import byte_level
from .models import perturb

GUIDES = Path(__file__).parent.parent / "docs" / "guides"


@pytest.fixture
def there(tmp_path, monkeypatch):
    """What the guides take for granted: a base, and two adapters of it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = models.llama(vocab_size=300)
    base.save_pretrained("base")
    byte_level().save_pretrained("base")
    for seed, name in enumerate(("my-adapter", "other-adapter")):
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        perturb(get_peft_model(copy.deepcopy(base), config), seed=seed).save_pretrained(name)


def blocks(guide: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (GUIDES / guide).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("guide", ["deploy.md", "many-adapters.md"])
def test_the_guide_runs(guide, there):
    lines = [line for block in blocks(guide, "sh") for line in block.splitlines() if line.strip()]
    assert len(lines) >= 4 and all(line.startswith("veneer ") for line in lines)
    for line in lines:
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, f"{line}: {done.output} {done.exception}"
    python = "\n".join(blocks(guide, "python"))
    assert python
    exec(compile(python, guide, "exec"), {})
