"""`veneer train` as a command: flags over a recipe, columns by flag, JSON, half precision, loggers, hub ids."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from veneer.cli import app
from veneer.errors import ConfigError

from .test_train import base  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [{"q": f"{a} + {b}?", "a": str(a + b)} for a in range(3, 7) for b in range(2, 4)]


@pytest.fixture
def recipe(base, tmp_path) -> str:  # noqa: F811
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    keys = dict(model=base, data=str(tmp_path / "rows.jsonl"), rank=2, max_steps=1, learning_rate=0.01, batch_size=4)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys | {"output": str(tmp_path / "out")}))
    return str(tmp_path / "recipe.yaml")


COLUMNS = ("--column", "question=q", "--column", "answer=a")


def call(*arguments: str) -> dict:
    done = CliRunner().invoke(app, ["train", *arguments, *COLUMNS, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_flags_win_over_the_recipe_and_json_is_the_report(recipe, tmp_path):
    given = ["--rank", "3", "--max-steps", "2", "--option", "lora_alpha=5", "--set", "warmup=0", "--seed", "4"]
    found = call(recipe, *given, "--dtype", "bfloat16", "--eval-split", "2")
    assert found == json.loads((tmp_path / "out" / "report.json").read_text())
    kept = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    wanted = dict(rank=3, max_steps=2, options={"lora_alpha": 5}, warmup=0, seed=4, dtype="bfloat16", batch_size=4)
    assert {key: kept[key] for key in wanted} == wanted
    assert kept["data"][0]["columns"] == {"question": "q", "answer": "a"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 5) and found["steps"] == 2


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow", "swanlab"])
def test_loggers_by_flag(recipe, monkeypatch, name: str):
    """A callback in the place of transformers' own, most of which need an account or a server."""
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    logged: list[dict] = []

    class Stub(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            assert args.run_name == "out" and getattr(args, "trackio_static_space_id", False) is False
            logged.append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, Stub)
    call(recipe)
    assert not logged
    call(recipe, "--overwrite", "--report-to", name)
    assert any("loss" in entry for entry in logged)


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow", "swanlab"])
def test_a_logger_that_is_not_installed_is_told_at_once(recipe, monkeypatch, tmp_path, name: str):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: False)
    done = CliRunner().invoke(app, ["train", recipe, "--report-to", name])
    assert isinstance(done.exception, ConfigError) and f"pip install {name}" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_hub_id_is_asked_of_datasets(recipe, monkeypatch):
    import datasets

    asked = []

    def load(name: str, split: str, streaming: bool):
        asked.append((name, split, streaming))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert call(recipe, "--data", "someone/sums", "--split", "half")["data"]["rows"] == len(ROWS)
    assert asked == [("someone/sums", "half", False)]


def test_a_run_that_never_began_is_not_resumed(tmp_path):
    done = CliRunner().invoke(app, ["train", "--model", "m", "--output", str(tmp_path / "none"), "--resume"])
    assert "there is no run to resume" in str(done.exception) and "recipe.yaml" in str(done.exception)


def test_a_wrong_flag_is_named(recipe):
    done = CliRunner().invoke(app, ["train", recipe, "--set", "lerning_rate=1"])
    assert "no key 'lerning_rate'; nearest: learning_rate" in str(done.exception)
