"""Blocks that are freed and taken again cost no page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from veneer.ops import allocator
assert allocator.keep_blocks() is (not {plain})
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(16 << 20)
before = faults()
for _ in range(10):
    torch.zeros(16 << 20)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the settings")
def test_blocks_are_kept():
    def faults(plain: bool) -> int:
        environment = {"VENEER_PLAIN": "allocator"} if plain else {}
        command = [sys.executable, "-c", SCRIPT.format(plain=plain)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults(plain=False) * 10 < faults(plain=True)
