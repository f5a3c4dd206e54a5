"""The recipes in examples/ run, and stand for every shape of data; a tiny model takes the place of theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from veneer.files.recipe import read
from veneer.train.recipe import make
from veneer.train.run import train

from .test_train import base  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")
HERE = Path(__file__).parents[1]
RECIPES = sorted((HERE / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_an_example_runs(base, tmp_path, monkeypatch, path: Path):  # noqa: F811
    monkeypatch.chdir(HERE)
    content = read(path) | dict(model=base, output=str(tmp_path / "out"), max_steps=2, eval_every=None)
    content["options"] = content.get("options", {}) | ({"n_frequency": 20} if content["method"] == "fourierft" else {})
    report = train(make(content), console=Console(quiet=True))
    assert report["steps"] == 2 and (report["eval"] is not None) == ("eval_split" in content or "eval_data" in content)
    assert report["data"]["cut_rows"] == 0 or path.stem == "completion"


def test_each_recipe_has_a_result_of_its_own():
    """`make demo` has its own place."""
    names = [read(path)["output"] for path in RECIPES]
    expected = ["demo-output" if path.stem == "reminders" else f"out/{path.stem}" for path in RECIPES]
    assert names == expected and len(names) >= 8
