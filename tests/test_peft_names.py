"""Every module and every public name of PEFT is there, of the same kind and with the same parameters."""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from veneer.dropin.tables.absent import ABSENT, ABSENT_ATTRIBUTES, OTHER_PARAMETERS

from . import room

pytest.importorskip("peft")
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": room.PYTHONPATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def printed(*arguments: str) -> Any:
    command = [sys.executable, "-m", "tests.peft_names", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def listings(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What PEFT has, and what veneer has of it."""
    theirs = printed("peft")
    place = tmp_path_factory.mktemp("names") / "peft.json"
    place.write_text(json.dumps(theirs))
    return theirs, printed("veneer", str(place))


def homes(theirs: dict[str, Any]):
    """(module, name, description) of every name, in the module that defines it."""
    for module, names in theirs.items():
        for name, expected in names.items():
            if expected["home"] == module:
                yield module, name, expected


def is_listed(path: str, table: dict[str, str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for patterns in table.values() for pattern in patterns.split())


def test_every_module_imports(listings):
    theirs, ours = listings
    assert len(theirs) > 200
    assert [name for name in theirs if isinstance(ours[name], str)] == []


def test_every_name_is_there(listings):
    theirs, ours = listings
    assert [f"{module}.{name}" for module in theirs for name in theirs[module] if name not in ours[module]] == []


def test_every_name_is_of_pefts_kind(listings):
    theirs, ours = listings
    unlike = []
    for module, name, expected in homes(theirs):
        found = ours[module].get(name)
        if found is not None and found["kind"] != expected["kind"]:
            unlike.append(f"{module}.{name} is a {found['kind']}, not a {expected['kind']}")
    assert unlike == []


def test_what_is_absent_is_listed_and_only_that(listings):
    theirs, ours = listings
    absent = {f"{module}.{name}" for module, name, _ in homes(theirs) if "absent" in ours[module].get(name, ())}
    assert absent == {path for path in absent if is_listed(path, ABSENT)}
    patterns = [pattern for words in ABSENT.values() for pattern in words.split()]
    unused = [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(path, pattern) for path in absent)]
    assert unused == []


def test_parameters_are_pefts(listings):
    """Names, order and defaults; veneer's may have more of them if they can be left out."""
    theirs, ours = listings
    unlike = []
    for module, name, expected in homes(theirs):
        found = ours[module].get(name, {})
        path = f"{module}.{name}"
        if "absent" in found or is_listed(path, OTHER_PARAMETERS):
            continue
        if not fits(found.get("parameters"), expected.get("parameters")):
            unlike.append((path, found.get("parameters"), expected.get("parameters")))
    assert unlike == []


def test_classes_have_pefts_attributes(listings):
    theirs, ours = listings
    missing, unlike = [], []
    for module, name, expected in homes(theirs):
        found = ours[module].get(name, {})
        if expected["kind"] != "class" or "absent" in found:
            continue
        for attribute, described in expected["attributes"].items():
            path = f"{module}.{name}.{attribute}"
            if is_listed(path, ABSENT_ATTRIBUTES):
                continue
            if attribute not in found.get("attributes", {}):
                missing.append(path)
            elif isinstance(described, list) and not is_listed(path, OTHER_PARAMETERS):
                own = found["attributes"][attribute]
                if not fits(own, described):
                    unlike.append((path, own, described))
    assert (missing, unlike) == ([], [])


POSITIONAL = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")
STARS = ("VAR_POSITIONAL", "VAR_KEYWORD")


def fits(ours: Any, theirs: Any) -> bool:
    """Whether every call that PEFT's parameters allow means the same with ours."""
    if not isinstance(theirs, list) or not isinstance(ours, list):
        return ours == theirs or theirs is None
    named = [p for p in theirs if p[1] not in STARS]
    own = [p for p in ours if p[1] not in STARS]
    defaults = {name: default for name, _, default in own}
    for name, _, default in named:
        if name not in defaults or (default is not None and defaults[name] != default):
            return False
    order = [p[0] for p in named if p[1] in POSITIONAL]
    own_order = [p[0] for p in own if p[1] in POSITIONAL]
    stars = {p[1] for p in theirs} & set(STARS)
    more = [p for p in own if p[0] not in {q[0] for q in named}]
    if len(stars) == 2:
        return own_order[: len(order)] == order
    may_be_left_out = all(p[2] is not None for p in more)
    has_stars = stars <= {p[1] for p in ours} or bool(more)
    return own_order[: len(order)] == order and may_be_left_out and has_stars
