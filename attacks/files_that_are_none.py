"""`inspect` and `diff` on directories, devices, links in a circle, garbage: they describe, and do not hang."""

import signal
import sys

from _common import CONFIG, WEIGHTS, adapter
from typer.testing import CliRunner

from veneer.cli import app

signal.alarm(120)
whole = adapter()
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
        for verb in (["inspect", str(home)], ["diff", str(home), str(whole)]):
            error = CliRunner().invoke(app, verb).exception
            if error is not None and not isinstance(error, (ValueError, OSError, SystemExit)):
                verdict = f"SUCCEEDED: {name}, {verb[0]}: {type(error).__name__}: {error}"
print(f"files_that_are_none {verdict}")
sys.exit(verdict.startswith("SUCCEEDED"))
