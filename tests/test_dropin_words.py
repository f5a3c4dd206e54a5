"""What programs read on layers, and the words and classes of errors and warnings, are PEFT's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from . import room

pytest.importorskip("peft")
ROOT = Path(__file__).parents[1]


@cache
def outcomes(library: str) -> dict[str, Any]:
    env = {**os.environ, "PYTHONPATH": room.PYTHONPATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.peft_words", library]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def agrees(ours: Any, theirs: Any) -> bool:
    """The same, where behind PEFT's sentence veneer's own may follow."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(agrees, ours, theirs))
    return ours.startswith(theirs) if isinstance(ours, str) and isinstance(theirs, str) else ours == theirs


def test_each_case_comes_to_the_same():
    ours, theirs = outcomes("veneer"), outcomes("peft")
    assert len(theirs) > 40 and ours.keys() == theirs.keys()
    unlike = {name: (ours[name], theirs[name]) for name in theirs if not agrees(ours[name], theirs[name])}
    assert not unlike
