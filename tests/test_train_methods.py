"""Every method of the registry trains through the keys of one recipe, and trains as many parameters as planned."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from veneer.core.config import TaskType
from veneer.files.skeleton import skeleton
from veneer.report.forecast import forecast
from veneer.train.recipe import make
from veneer.train.run import train
from veneer.train.setup import method_config

from .cases import ONE_EACH, Case
from .test_train import base  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")
BY_VALUES = {"adamss"}
"""It sizes its parts by the values of the weights, which a config does not hold."""


def is_plain(value: object) -> bool:
    """It can be written in YAML."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def has_a_recipe(case: Case) -> bool:
    """Adapters that read others, or are made of several, need more than one recipe."""
    return not case.siblings and not case.needs_experts and is_plain(case.settings)


def recipe_of(case: Case, home: str, data: str, output: str):
    options = dict(case.settings)
    keys = {"rank": options.pop("r", None), "targets": options.pop("target_modules", None)}
    options.pop("task_type", None)
    run = dict(batch_size=2, max_steps=2, max_length=64, learning_rate=1e-2, warmup=0, save_every=2)
    return make(dict(model=home, data=data, output=output, method=case.method, options=options) | keys | run)


@pytest.mark.parametrize("case", [c for c in ONE_EACH if has_a_recipe(c)], ids=str)
def test_a_method_trains_what_is_planned(base, tmp_path, case: Case):  # noqa: F811
    tasks = case.facts.get("task_ids", [0])
    words = "$, cut"  # the tokens that the case of trainable tokens trains
    rows = [{"prompt": words, "completion": str(n), "task_ids": tasks[n % len(tasks)]} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(case, base, str(tmp_path / "rows.jsonl"), str(tmp_path / "out"))
    report = train(recipe, console=Console(quiet=True))
    assert report["steps"] == 2 and (tmp_path / "out" / "adapter_model.safetensors").is_file()
    if case.method not in BY_VALUES:
        planned = forecast(skeleton(base), method_config(recipe, TaskType.CAUSAL_LM, 2), 2, 64)
        assert planned.trainable == report["trainable_parameters"]


def test_what_is_left_out_is_made_of_several_adapters():
    left = {case.method for case in ONE_EACH if not has_a_recipe(case)}
    assert left <= {"xlora", "arrow", "fusion", "union", "mam", "unipelt", "split", "average"}
