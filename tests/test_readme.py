"""Every code block of the READMEs and of the tutorial runs, in order, on the real model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import room
from .forked import veneer

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh-CN.md"]
TUTORIAL = "docs/tutorial.md"


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


@pytest.mark.slow
@pytest.mark.parametrize("readme", [*READMES, TUTORIAL])
def test_the_python_runs(readme: str, tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks(readme, "python")), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=room.SECONDS
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert "trainable params: 460,800 || all params: 134,975,808 || trainable%: 0.3414" in done.stdout
    assert "8 x (576 + 192)" in done.stdout and "+ LoRA[default](r=8, scaling=4, 576 -> 576)" in done.stdout
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 2_000_000


@pytest.mark.parametrize("readme", READMES)
def test_the_commands_exist(readme: str):
    makefile = (ROOT / "Makefile").read_text()
    lines = [
        line.split("#")[0].split() for block in blocks(readme, "sh") for line in block.splitlines() if line.strip()
    ]
    assert lines
    for words in lines:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        elif words[0] == "veneer" and "--help" not in words:
            done = veneer(*words[1:], *([] if "--list" in words else ["--help"]))
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("readme", READMES)
def test_the_links_lead_somewhere(readme: str):
    prose = re.sub(
        r"^```.*?^```|^ {4}.*?$", "", (ROOT / readme).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert target.startswith("https://") or (ROOT / target).exists(), target
