"""veneer on every architecture of transformers that generates text: `python -m tests.architectures [NAME ...]`.

Without names, all of them, and the table in docs/architectures.json is written anew.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "architectures.json"


def as_text(version: str, rows: list[dict]) -> str:
    """JSON with a line for each model class."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"transformers": "{version}", "architectures": [\n{lines}\n]}}\n'


def main() -> int:
    """Print what is at fault; the exit status says whether anything is."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.simplefilter("ignore")
    import torch
    import transformers

    from . import tiny
    from .checks import CHECKS, outcome

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model classes; all if none is named")
    parser.add_argument("--check", choices=CHECKS, action="append", help="only this check; may be given again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict] = []
    faults = 0
    for name in args.names or sorted(tiny.classes()):
        row: dict = {"class": name, "model_type": tiny.classes()[name], "not_built": "", "checks": {}}
        rows.append(row)
        reason = tiny.why_not(name)
        if reason:
            row["not_built"] = reason
            print(f"{name}: not built: {reason}", flush=True)
            continue
        said = []
        for check in args.check or CHECKS:
            kind, why = outcome(CHECKS[check], lambda name=name: tiny.build(name))
            row["checks"][check] = [kind, why]
            faults += kind == "fault"
            if kind != "holds":
                said.append(f"  {kind} {check}: {why[:240]}")
        print(name, *said, sep="\n", flush=True)
    print(f"{len(rows)} architectures, {faults} faults")
    if not args.names and not args.check:
        PAGE.write_text(as_text(transformers.__version__, rows))
    return int(faults > 0)


sys.exit(main())
