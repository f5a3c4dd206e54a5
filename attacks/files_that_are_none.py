"""`inspect` and `diff` on directories, devices, links in a circle, garbage: they describe, and do not hang."""

import subprocess
import sys

from _common import CONFIG, WEIGHTS, adapter

verdict = "failed: each was described or refused"
for name in (CONFIG, WEIGHTS):
    for make in (
        lambda p: p.mkdir(),
        lambda p: p.symlink_to("/dev/zero"),
        lambda p: p.symlink_to(p),
        lambda p: p.write_bytes(b"\xff" * 100),
        lambda p: p.write_bytes(b"[" * 100_000),
    ):
        home = adapter()
        (home / name).unlink()
        make(home / name)
        for verb in (["inspect", str(home)], ["diff", str(home), str(adapter())]):
            done = subprocess.run([sys.executable, "-m", "veneer", *verb], capture_output=True, text=True, timeout=60)
            if done.returncode not in (0, 2) or "Traceback" in done.stderr:
                verdict = f"SUCCEEDED: {name}, {verb[0]}: {done.stderr[-300:]}"
print(f"files_that_are_none {verdict}")
sys.exit(verdict.startswith("SUCCEEDED"))
