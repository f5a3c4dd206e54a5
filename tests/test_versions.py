"""Which versions were tried: one place says it, and the constraints, the bounds, the page and the doctor agree."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import veneer
from veneer import LoraConfig, get_peft_model
from veneer.dropin.tables.methods import VERSION
from veneer.report.environment import environment
from veneer.upstream import peft, versions
from veneer.upstream.versions import TRIED, Range

from . import models
from .forked import veneer as command

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parent.parent


def pins(name: str) -> dict[str, str]:
    """The versions that a file of constraints pins, by distribution."""
    lines = (ROOT / name).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in requirements}


@pytest.mark.parametrize("name", TRIED)
def test_the_constraints_are_the_ends_of_the_range(name: str):
    assert pins("constraints-oldest.txt")[canonicalize_name(name)] == TRIED[name].oldest
    assert pins("constraints.txt")[canonicalize_name(name)] == TRIED[name].newest


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
def test_no_dependency_allows_less_than_was_tried():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = pins("constraints-oldest.txt")
    extras = project["optional-dependencies"]
    bounded = [*project["dependencies"], *extras["clients"]]
    bounded += [text for text in extras["test"] if canonicalize_name(Requirement(text).name) in oldest]
    for text in bounded:
        requirement = Requirement(text)
        bounds = [s.version for s in requirement.specifier if s.operator == ">="]
        assert bounds == [oldest[canonicalize_name(requirement.name)]], text


def test_the_page_names_the_range():
    page = (ROOT / "docs" / "versions.md").read_text()
    rows = dict(re.findall(r"^\| ([\w-]+) \| (\S+ to \S+) \|", page, re.MULTILINE))
    assert rows == {name: str(tried) for name, tried in TRIED.items()}


def test_the_doctor_names_the_range():
    here = environment()
    assert here.tried == {name: str(tried) for name, tried in TRIED.items()}
    shown = command("doctor").stdout
    assert all(f"tried with {tried}" in shown for tried in TRIED.values())


@pytest.mark.parametrize(
    ("version", "place"),
    [
        ("5.19.1", "older"),
        ("5.20.0", None),
        ("5.20.0.dev0", "older"),
        ("5.24.0", None),
        ("5.24.3", None),
        ("5.24.0+cpu", None),
        ("5.25.0", "newer"),
        ("5.25.0.dev0", "newer"),
        ("6.0.0", "newer"),
        ("a fork", None),
    ],
)
def test_what_is_outside(version: str, place: str | None):
    assert Range("5.20.0", "5.24.0").place_of(version) == place


@pytest.fixture
def untried(monkeypatch):
    """A transformers that nobody tried, and an old accelerate."""
    real = versions.installed
    pretended = {"transformers": "5.99.0", "accelerate": "1.0.0"}
    monkeypatch.setattr(versions, "installed", lambda name: pretended.get(name) or real(name))
    monkeypatch.setattr(versions, "_is_remarked", False)


def test_the_doctor_tells_what_was_not_tried(untried):
    here = environment()
    assert any("transformers 5.99.0 is newer than the newest version that was tried, 5.24.0" in u for u in here.untried)
    assert any("accelerate 1.0.0; veneer needs" in problem for problem in here.problems)
    assert not any("transformers" in problem for problem in here.problems), "newer may work"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from Python 3.11 on")
def test_the_first_failure_says_so_beside_the_real_error(untried):
    with pytest.raises(veneer.TargetError, match="nothing_like_it") as failure:
        get_peft_model(models.build("llama"), LoraConfig(target_modules=["nothing_like_it"]))
    (note,) = failure.value.__notes__
    assert note.startswith("note: transformers 5.99.0 is newer") and "\n" not in note
    with pytest.raises(veneer.TargetError) as second:
        get_peft_model(models.build("llama"), LoraConfig(target_modules=["nothing_like_it"]))
    assert not hasattr(second.value, "__notes__")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from Python 3.11 on")
def test_a_failing_call_says_so_too(untried):
    model = get_peft_model(models.build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TypeError) as failure:
        model(input_ids=3.5, past=True)
    assert failure.value.__notes__[0].startswith("note: transformers 5.99.0")


def test_the_command_line_says_so(untried, tmp_path):
    done = command("inspect", str(tmp_path / "absent"))
    first, second = done.stderr.splitlines()
    assert first.startswith("error: ") and second.startswith("note: transformers 5.99.0"), done.stderr


def test_nothing_is_said_of_versions_that_were_tried():
    """This environment's, which is the newest or the oldest that was tried."""
    assert versions.untried() == [] and versions.remark() is None


@pytest.mark.parametrize(("asked", "left"), [("99.0.0", VERSION), ("0.1.0", "0.1.0")])
def test_transformers_takes_the_drop_ins_version_of_peft(asked: str, left: str, monkeypatch):
    """transformers may ask for a PEFT that is not out; the name it asks under must be there, or nothing is lowered."""
    from transformers.integrations import peft as integration

    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", asked)
    peft._lower(VERSION, integration)
    assert left == integration.MIN_PEFT_VERSION
