"""`veneer train` on two processes (gloo, CPU), replicated and sharded: the same as one at the same global batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState
from rich.console import Console
from safetensors.torch import load_file

from veneer.errors import ConfigError
from veneer.train.recipe import make
from veneer.train.run import train

from . import room
from .test_distributed import free_port
from .test_train import base, failing  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
}
"""What `accelerate launch --use_fsdp --fsdp_version 2` sets."""
UNEQUAL = [
    {"question": f"{a} + {b}?", "answer": str(a + b) + "!" * (a * b % 13)} for a in range(3, 8) for b in range(5)
]
"""25 rows whose answers have from 2 to 15 tokens: a mean of means would be another loss."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in UNEQUAL))
    return str(path)


def process(rank: int, port: int, environment: dict[str, str], runs: list[tuple[dict, dict]]) -> None:
    os.environ |= environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "HF_HUB_OFFLINE": "1"}
    AcceleratorState._reset_state(reset_partial_state=True)  # that of the process this one is a copy of
    for recipe, how in runs:
        train(make(recipe), console=Console(quiet=True), **how)
    torch.distributed.destroy_process_group()


def two(runs: list[tuple[dict, dict]], sharded: bool = False) -> None:
    """Recipes, one after the other, on two processes; beside each what `train` is called with."""
    given = (free_port(), SHARDED if sharded else {}, runs)
    mp.start_processes(process, given, nprocs=2, start_method="fork")  # without the seconds that imports take


def one(recipe: dict, **how) -> dict:
    return train(make(recipe), console=Console(quiet=True), **how)


def recipe(base, data, output, **settings) -> dict:  # noqa: F811
    own = dict(model=base, data=data, output=str(output), batch_size=4, rank=4, learning_rate=1e-2, max_steps=3)
    return own | settings


def report(where) -> dict:
    return json.loads((Path(where) / "report.json").read_text())


def tensors(where) -> dict[str, torch.Tensor]:
    return load_file(Path(where) / "adapter_model.safetensors")


def assert_same(a, b, processes: int = 2) -> None:
    first, second = report(a), report(b)
    assert second["processes"] == processes
    assert second["losses"] == pytest.approx(first["losses"], rel=1e-5)
    terms, other_terms = ([entry.get("method_loss", 0.0) for entry in run["history"]] for run in (first, second))
    assert other_terms == pytest.approx(terms, rel=1e-4)
    for key in ("real_tokens", "supervised_tokens", "steps", "trainable_parameters", "total_parameters"):
        assert first[key] == second[key], key
    if first["eval"]:
        assert second["eval"]["loss"] == pytest.approx(first["eval"]["loss"], rel=1e-5)
        assert second["eval"]["accuracy"] == first["eval"]["accuracy"]
        assert [e["step"] for e in second["eval"]["history"]] == [e["step"] for e in first["eval"]["history"]]
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


BEST = dict(learning_rate=0.3, schedule="constant", warmup=0, eval_split=7, eval_every=1, max_steps=5)
CASES = {
    "epochs": dict(max_steps=None, epochs=1, eval_split=5),  # 20 rows: the last batch of an epoch is whole
    "blanks": dict(max_steps=None, epochs=2, batch_size=24),  # 25 rows: one process has only blanks at the end
    "accumulated": dict(batch_size=2, accumulate=3, gradient_checkpointing=True),
    "dora": dict(options={"use_dora": True}),
    "best": BEST,
    "packed": dict(packing=True, max_length=120, batch_size=2),
    "prompt": dict(method="prompt_tuning", rank=None),
    "adalora": dict(method="adalora", rank=2, options={"tinit": 1, "tfinal": 2}, max_steps=6),
    "streamed": dict(streaming=True),
}


def halved(settings: dict) -> dict:
    return settings | {"batch_size": settings.get("batch_size", 4) // 2}


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_two_processes_do_what_one_does(base, data, tmp_path, sharded: bool):  # noqa: F811
    names = [name for name in CASES if not (sharded and name == "adalora")]  # it looks at whole factors
    pairs = {
        name: {k: v for k, v in CASES[name].items() if v is not None or k in ("max_steps", "rank")} for name in names
    }
    runs = [(recipe(base, data, tmp_path / f"two-{name}", **halved(own)), {}) for name, own in pairs.items()]
    two(runs, sharded)
    for name, own in pairs.items():
        found = one(recipe(base, data, tmp_path / f"one-{name}", **own))
        if name == "best":
            assert 0 < found["eval"]["step"] < 5  # or nothing was loaded
        assert_same(tmp_path / f"one-{name}", tmp_path / f"two-{name}")


def stopped(whole: Path, where: Path) -> Path:
    """A run that got as far as its last checkpoint but one."""
    shutil.copytree(whole, where)
    for name in ("report.json", "adapter_model.safetensors", "adapter_config.json"):
        (where / name).unlink()
    before, last = sorted((where / "checkpoints").iterdir())
    assert (before.name, last.name) == ("checkpoint-2", "checkpoint-4")
    shutil.rmtree(last)
    return where


def test_a_run_goes_on_with_other_processes(base, data, tmp_path):  # noqa: F811
    settings = dict(save_every=2, eval_split=5, eval_every=2, max_steps=4)
    whole, half = (
        recipe(base, data, tmp_path / "one", **settings),
        recipe(base, data, tmp_path / "two", **halved(settings)),
    )
    one(whole)
    go_on = [(half | {"output": str(stopped(tmp_path / "one", tmp_path / "one-two"))}, {"resume": True})]
    two([(half, {}), *go_on])
    sharded = half | {"output": str(tmp_path / "sharded")}
    again = [stopped(tmp_path / "one", tmp_path / "one-sharded"), stopped(tmp_path / "two", tmp_path / "two-sharded")]
    two([(sharded, {}), *[(half | {"output": str(w)}, {"resume": True}) for w in again]], sharded=True)
    for name in ("two", "sharded"):
        one(whole | {"output": str(stopped(tmp_path / name, tmp_path / f"{name}-one"))}, resume=True)
    for name in ("two", "one-two", "sharded", "one-sharded", "two-sharded"):
        assert_same(tmp_path / "one", tmp_path / name)
    for name in ("two-one", "sharded-one"):
        assert_same(tmp_path / "one", tmp_path / name, processes=1)
    stop = stopped(tmp_path / "two", tmp_path / "refused")
    with pytest.raises(ConfigError, match="a step had 4 sequences .*, now 2"):
        one(half | {"output": str(stop)}, resume=True)


def cli(*command: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    whole = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=whole, timeout=room.SECONDS
    )


def flags(base, data, output) -> list[str]:  # noqa: F811
    given = dict(model=base, data=data, output=output, rank=4, learning_rate="1e-2", max_steps=3, batch_size=2)
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow), "fsdp"])
def test_launched_as_people_do(base, data, tmp_path, launcher: str):  # noqa: F811
    fsdp = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    accelerate = [
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    ]
    accelerate += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    words = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())],
        "accelerate": [*accelerate, "--multi_gpu"],
        "fsdp": [*accelerate, *fsdp],
    }[launcher]
    done = cli(*words, "-m", "veneer", "train", *flags(base, data, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter    ") == 1 and done.stderr.count("step 3/3") == 1
    one(recipe(base, data, tmp_path / "one"))
    assert_same(tmp_path / "one", tmp_path / "two")


def test_a_refusal_ends_both_processes(base, data, tmp_path):  # noqa: F811
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "report.json").write_text("{}")
    words = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = cli(*words, "-m", "veneer", "train", *flags(base, data, tmp_path / "two"))
    assert done.returncode != 0 and "already holds report.json" in done.stderr
