"""Every command of the guides runs, in order, as it stands there: on a tiny model, and (slowly) on the real one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers

from veneer.files import pull as hub

from . import models
from .chat_templates import TEMPLATES
from .forked import forked, veneer
from .test_train_chat import tokenizer

ROOT = Path(__file__).parent.parent
GUIDES = ["fine-tune", "quantised", "second-stage", "preferences", "evaluate", "use-an-adapter", "gguf"]


def commands(guide: str, language: str = "sh") -> str:
    text = (ROOT / "docs" / "guides" / f"{guide}.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory) -> Path:
    """A cache whose SmolLM2 is a tiny Llama, with a tokenizer that GGUF has a name for."""
    cache = tmp_path_factory.mktemp("cache")
    home = cache / hub.DEFAULT
    words = tokenizer(TEMPLATES[0], ("the",))
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.pad_token = "<|im_end|>"
    words.save_pretrained(home)
    torch.manual_seed(0)
    ids = dict(pad_token_id=None, bos_token_id=None, eos_token_id=words.eos_token_id)
    models.llama(vocab_size=len(words), max_position_embeddings=2048, **ids).save_pretrained(home)
    (home / hub.MARKER).write_text(json.dumps({"gguf_sha256": hub.MODELS[hub.DEFAULT].gguf_sha256, "files": {}}))
    return cache


def run(guide: str) -> str:
    """Run a guide's commands and its Python in this directory; what they show."""
    shutil.copytree(ROOT / "examples" / "data", Path("examples") / "data")
    shown = ""
    for line in whole_lines(commands(guide)):
        before, command = line.split("veneer ", 1) if "veneer " in line.split("\n")[0] else (line, None)
        given = shell(before.rstrip("| ")) if before else ""
        if command is None:
            shown += given
            continue
        done = veneer(*shlex.split(command), given=given)
        assert done.returncode == 0, line + done.stdout[-1500:] + done.stderr[-3000:]
        shown += done.stdout
    done = forked(lambda: exec(compile(commands(guide, "python"), guide, "exec"), {}))
    assert done.returncode == 0, done.stderr
    return shown + done.stdout


def whole_lines(script: str) -> list[str]:
    """Commands, each with the lines that belong to it: after a backslash, or up to END."""
    found: list[str] = []
    for line in script.splitlines():
        if found and (found[-1].endswith("\\") or ("<<" in found[-1] and not found[-1].endswith("\nEND"))):
            found[-1] = found[-1].removesuffix("\\") + ("\n" if "<<" in found[-1] else " ") + line
        else:
            found.append(line)
    return [line for line in found if line.strip()]


def shell(command: str) -> str:
    done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def stand_in_hub(monkeypatch):
    """A hub that takes what it is given; `test_push.py` sends real requests to one."""
    import huggingface_hub

    def upload_folder(*, repo_id: str, folder_path: str, **settings):
        assert repo_id == "me/my-adapter" and (Path(folder_path) / "adapter_model.safetensors").is_file()
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **settings: huggingface_hub.RepoUrl(name))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)


@pytest.mark.parametrize("guide", GUIDES)
def test_the_commands_of_a_guide_run(guide: str, tiny_cache: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VENEER_CACHE", str(tiny_cache))
    assert run(guide)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("VENEER_GUIDES"), reason="takes minutes; `make guides` runs it")
@pytest.mark.parametrize("guide", GUIDES)
def test_they_run_on_the_real_model(guide: str, tmp_path: Path, monkeypatch):
    """And the adapter of the guide is better than its base."""
    monkeypatch.chdir(tmp_path)
    shown = run(guide)
    if guide == "evaluate":
        lines = [line for line in shown.splitlines() if "token accuracy" in line]
        losses = {line.split()[0]: float(line.split()[2]) for line in lines[:2]}
        assert losses["my-adapter"] < 0.5 * losses["base"], losses
    elif guide == "use-an-adapter":
        assert '"task":' in shown
