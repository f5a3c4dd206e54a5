"""Random sequences of PEFT's calls do the same on veneer under the name peft as on the real PEFT.

Each library runs in processes of its own (tests/peft_calls.py). `make differential` runs 500 sequences; what differs on
purpose is listed here, and on docs/coming-from-peft.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from . import room

pytest.importorskip("peft")
SEQUENCES = int(os.environ.get("VENEER_DIFFERENTIAL", "40"))
ROOT = Path(__file__).parents[1]


def traces(library: str, seeds: range) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.peft_calls", library, str(seeds.start), str(seeds.stop)]
    environment = {**os.environ, "PYTHONPATH": room.PYTHONPATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_the_same_calls_do_the_same():
    with ThreadPoolExecutor(2) as pool:
        theirs, ours = pool.map(lambda library: traces(library, range(SEQUENCES)), ("peft", "veneer"))
    assert len(theirs) == len(ours) == SEQUENCES
    found = [d for a, b in zip(theirs, ours, strict=True) if (d := difference(a, b)) is not None]
    assert not found, "\n\n".join(found[:5])
    ended = sum(
        all(unlike(x, y, a["method"]) is None for x, y in zip(a["steps"], b["steps"], strict=True))
        for a, b in zip(theirs, ours, strict=True)
    )
    assert ended > SEQUENCES / 2  # most sequences are compared to their end


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first difference between two traces that is not intended, as a message."""
    for i, (a, b) in enumerate(zip(theirs["steps"], ours["steps"], strict=True)):
        what = unlike(a, b, theirs["method"])
        if what is not None and is_intended(theirs, ours, i):
            return None
        if what is not None:
            calls = [step["call"] for step in theirs["steps"][: i + 1]]
            a, b = ({"error": s.get("error"), "message": s.get("message"), what: look(s, what)} for s in (a, b))
            return (
                f"seed {theirs['seed']}, {theirs['method']} on {theirs['model']}, {calls}: {what}\nPEFT {a}\nhere {b}"
            )
    return None


def look(step: dict[str, Any], what: str) -> Any:
    seen = step.get("seen")
    return seen[what] if isinstance(seen, dict) and what in seen else step.get(what)


def unlike(a: dict[str, Any], b: dict[str, Any], method: str) -> str | None:
    """In what two steps differ: the error, the result, or a part of what is seen after."""
    if bool(a.get("error")) != bool(b.get("error")) or (a.get("error") and a["error"][0] not in b["error"]):
        return "error"
    if not alike(a.get("result"), b.get("result")):
        return "result"
    seen, here = a.get("seen"), b.get("seen")
    if not isinstance(seen, dict) or not isinstance(here, dict):
        return None if seen == here else "seen"
    return next((k for k in seen if not alike(known(seen[k], k, method), known(here.get(k), k, method))), None)


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-3 * max(1.0, abs(a))
    return a == b


def known(value: Any, key: str, method: str) -> Any:
    """What is seen, without what is called otherwise on purpose."""
    if key in ("keys", "trainable") and isinstance(value, list):  # a layer whose last adapter went is a plain module
        names = [n.replace(".base_layer", "").replace(".original_module", "") for n in value]
        return sorted(name for name in names if ".ranknum." not in name)
    if method == "adalora" and key == "count":  # PEFT counts a frozen parameter for the rank of each layer
        return value[0] if isinstance(value, list) else value
    if method == "adalora" and key == "status" and isinstance(value, dict):
        return {k: v for k, v in value.items() if k != "total_params"}
    return value


def is_intended(theirs: dict[str, Any], ours: dict[str, Any], i: int) -> bool:
    """Differences on purpose, after which a sequence is not followed further; docs/coming-from-peft.md says why."""
    step, here, method = theirs["steps"][i], ours["steps"][i], theirs["method"]
    calls = {s["call"] for s in theirs["steps"][: i + 1]}
    seen, mine = (s["seen"] if isinstance(s.get("seen"), dict) else {} for s in (step, here))
    runs = not str(mine.get("output", "raises")).startswith("raises")
    return any(
        (
            runs and str(seen.get("output")).startswith("raises"),  # PEFT's model is broken: no adapter is left
            "UnboundLocalError" in (step.get("error") or ()),  # PEFT's disable_adapter() of a prompt that classifies
            method in ("vera", "randlora", "vblora")
            and "add_adapter" in calls,  # a second one shares the first's tensors
            method == "lora_bias" and {"merge", "merge_and_unload", "merge_one"} & calls,  # PEFT merges some layers
            "KeyError" in (step.get("error") or ()),  # a name without an adapter was active
            "layers_off" in calls and step["call"] in ("unload", "merge_and_unload"),  # PEFT drops some trained heads
            "layers_off" in calls and "add_adapter" in calls and "irregular" in str(seen.get("status")),
            "delete" in calls and seen.get("status") != mine.get("status"),  # PEFT counts layers without adapters
        )
    )


def test_a_difference_is_seen():
    step = {"call": "merge", "result": None, "seen": {"output": [1.0], "merged": ["default"]}}
    trace = {"seed": 0, "method": "lora", "model": "mlp", "steps": [step]}
    for change in ({"error": ["ValueError"]}, {"result": 1}, {"seen": {"output": [1.1], "merged": ["default"]}}):
        assert difference(trace, {**trace, "steps": [{**step, **change}]}) is not None
    assert difference(trace, trace) is None
