"""Run a program that imports PEFT on veneer: `python -m veneer.as_peft [--strict] program.py arguments ...`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from .dropin import install_as_peft

USAGE = "usage: python -m veneer.as_peft [--strict] (program.py | -m module) [arguments ...]"


def main() -> None:
    arguments = sys.argv[1:]
    strict = arguments[:1] == ["--strict"]
    arguments = arguments[1:] if strict else arguments
    is_module = arguments[:1] == ["-m"]
    arguments = arguments[1:] if is_module else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        raise SystemExit(0 if arguments else 2)
    if not is_module and not Path(arguments[0]).exists():
        print(f"{arguments[0]!r}: there is no such program", file=sys.stderr)
        raise SystemExit(2)
    install_as_peft(strict)
    sys.argv = arguments
    if is_module:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
