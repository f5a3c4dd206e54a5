"""`veneer plan`: what it says before training is what is there in training."""

from __future__ import annotations

import inspect
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from veneer import LoraConfig, TargetError, VeneerError
from veneer.cli._options import add_settings
from veneer.cli.plan import folded, plan
from veneer.files.skeleton import skeleton
from veneer.model.catalogue import config_for
from veneer.report import memory
from veneer.report.epoch import COUNTED, epoch_of
from veneer.report.forecast import forecast
from veneer.terminal import size
from veneer.train.meter import Meter
from veneer.train.recipe import Recipe, make
from veneer.train.run import train
from veneer.train.setup import method_config, method_settings

from . import models, room
from .cases import ONE_EACH, Case
from .chat_templates import TEMPLATES
from .forked import veneer
from .models import LLAMA
from .test_train import base, data  # noqa: F401
from .test_train_chat import tokenizer

BIG = dict(
    model_type="llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, vocab_size=128256, dtype="bfloat16", tie_word_embeddings=False,
)  # fmt: skip
SMALL = BIG | dict(
    hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
    vocab_size=6000, dtype="float32",
)  # fmt: skip


def config_dir(path, content: dict) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("case", [c for c in ONE_EACH if not (c.siblings or c.method == "adamss")], ids=str)
def test_planned_parameters_and_bytes_are_those_of_the_adapter(case: Case, tmp_path):
    real = case.build(moved=False)
    real.save_pretrained(tmp_path)
    with torch.device("meta"):
        base = models.BUILDERS[case.model]()
    found = forecast(base, case.config(), 2, 8)
    assert found.trainable == real.get_nb_trainable_parameters()[0]
    assert found.trainable == sum(row.added for row in found.rows) + found.outside or case.method in SUBSET
    file = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert found.file_bytes == pytest.approx(file, rel=0.05, abs=3000)  # the notes on the base are not counted


SUBSET = {"xlora"}
"""X-LoRA holds trained adapters that it does not train."""


def test_a_method_that_is_sized_by_values_says_so():
    with pytest.raises(VeneerError, match="depend on the values of the base weights"):
        forecast(llama(), config_for("adamss"), 1, 8)


def test_each_entry_says_what_it_hits():
    found = forecast(llama(), LoraConfig(r=3, target_modules=["q_proj", "mlp.down_proj"]), 1, 8)
    assert [(hit.entry, len(hit.paths)) for hit in found.hits] == [("q_proj", 2), ("mlp.down_proj", 2)]
    assert found.hits[1].parameters == 2 * 3 * (45 + 30)
    assert sum(hit.parameters for hit in found.hits) == found.trainable
    with pytest.raises(TargetError, match="nearest: q_proj"):
        forecast(llama(), LoraConfig(target_modules=["q_prj"]), 1, 8)


def llama():
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**LLAMA))


def test_a_70b_model_is_planned_in_two_seconds_and_one_gigabyte(tmp_path):
    script = f"""
import time
from veneer.model.catalogue import config_for
from veneer.report.forecast import forecast
from veneer.files.skeleton import skeleton
skeleton(None, "llama")  # the imports, which are not the plan's
config = config_for("lora", r=16, target_modules="all-linear")
start = time.process_time()
found = forecast(skeleton({config_dir(tmp_path / "big", BIG)!r}), config, 1, 512)
assert found.trainable == 80 * 16 * (4 * 8192 + 2 * 8192 + 2 * 1024 + 3 * (8192 + 28672)), found.trainable
assert found.memory.base == 2 * (found.total - found.trainable) and found.memory.total
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss outlives an exec
print(time.process_time() - start, int(peak.split()[1]) / 1e6)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=room.SECONDS
    )
    seconds, gigabytes = map(float, done.stdout.split())
    assert seconds < 2 and gigabytes < 1


MEASURE = """
import sys, torch, transformers
from veneer import get_peft_model
from veneer.model.catalogue import config_for
torch.set_num_threads(1)
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
model = get_peft_model(transformers.AutoModelForCausalLM.from_config(config), config_for(sys.argv[2])).train()
def step(rows, length):
    ids = torch.randint(3, 100, (rows, length))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()
def bytes_of(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) * 1024
step(1, 8)
open("/proc/self/clear_refs", "w").write("5")
before = bytes_of("VmRSS")
step(4, 256)
print(bytes_of("VmHWM") - before)
"""


TO_THE_END = """
import atexit, sys
from veneer.cli import main
from veneer.train.meter import peak_rss
atexit.register(lambda: print(peak_rss(), file=sys.stderr))
main()
"""
"""The command `veneer`, which says at its very end how much memory its process took."""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is measured as Linux tells it")
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_the_memory_of_a_step_is_what_is_measured(tmp_path, method: str):
    home = config_dir(tmp_path / "small", SMALL)
    planned = forecast(skeleton(home), config_for(method), 4, 256).memory.step
    # glibc otherwise keeps freed blocks of a few MB in its heap, and the peak is its own
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, home, method]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=room.SECONDS)
    assert planned == pytest.approx(int(done.stdout), rel=0.2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the process is measured on Linux")
@pytest.mark.parametrize(
    ("tiny", "flags"),
    [(True, []), (False, []), (False, ["--gradient-checkpointing"])],
    ids=["tiny", "small", "checkpointing"],
)
def test_the_memory_in_all_is_that_of_a_run(tmp_path, tiny: bool, flags: list[str]):
    """Of a real one, in a process of its own: the largest there was, with everything that it had loaded."""
    words = tokenizer(TEMPLATES[0])
    words.save_pretrained(tmp_path / "base")
    config = LLAMA if tiny else SMALL
    LlamaForCausalLM(LlamaConfig(**config | {"vocab_size": 6000})).save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text((json.dumps({"text": "so it goes on and on " * 20}) + "\n") * 16)
    same = ["--model", str(tmp_path / "base"), "--batch-size", "8", "--max-length", "256", *flags]
    planned = json.loads(veneer("plan", *same, "--json").stdout)["memory"]
    rows = str(tmp_path / "rows.jsonl")
    more = ["--data", rows, "--eval-data", rows, "--output", str(tmp_path / "out"), "--json"]
    command = [sys.executable, "-c", TO_THE_END, "train", *same, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=room.SECONDS)
    reported = json.loads(done.stdout)["peak_rss_bytes"]
    whole = int(done.stderr.splitlines()[-1])
    assert reported <= whole < 1.02 * reported
    assert planned["total"] == pytest.approx(whole, rel=0.2)
    assert tiny or planned["step"] > 5e7  # more than rounding beside the rest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere getrusage alone tells")
def test_the_peak_of_a_run_is_its_own():
    """Not that of a larger program that began it."""
    block = bytearray(1 << 30)
    script = "from veneer.train.meter import peak_rss; print(peak_rss())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=room.SECONDS
    )
    assert int(done.stdout) < len(block) * 0.9


@pytest.mark.parametrize("heads", [{}, SMALL], ids=["odd", "even"])  # attention of even sizes is another kernel
def test_checkpointing_and_short_rows_take_less(tmp_path, heads):
    def step(batch_size: int, length: int, **more: bool) -> int:
        one = skeleton(config_dir(tmp_path / "m", heads)) if heads else llama()
        return forecast(one, config_for("lora"), batch_size, length, **more).memory.step

    plain = step(4, 32)
    assert step(4, 32, checkpointing=True) < plain
    assert step(4, 16) < plain


DEEP = [c for c in ONE_EACH if c.model in ("llama", "gpt2") and not (c.siblings or c.needs_experts)]
DEEP = [c for c in DEEP if c.method != "adamss"]


@pytest.mark.parametrize("case", DEEP, ids=str)
def test_a_deep_model_takes_what_running_all_its_layers_takes(case: Case, monkeypatch):
    """By its first layers, or, where a method wants them all, by all of them."""
    planned = []
    for deep in (8, 99):
        monkeypatch.setattr(memory, "DEEP", deep)
        with torch.device("meta"):
            base = models.BUILDERS[case.model](**{"n_layer" if case.model == "gpt2" else "num_hidden_layers": 9})
        planned.append(forecast(base, case.config(), 2, 16).memory.step)
    assert planned[0] == planned[1] or planned[0] == pytest.approx(planned[1], rel=0.01)


def test_layers_that_differ_are_all_run():
    with torch.device("meta"):
        plain, other = models.llama(num_hidden_layers=9), models.llama(num_hidden_layers=9)
        other.model.layers[4].mlp = torch.nn.Linear(30, 30)
    assert memory._stack(plain) and memory._stack(other) is None


WORDS = ["lora_alpha=5", "init_lora_weights=pissa", "use_dora=true"]


@pytest.mark.parametrize("given", [dict(set_=WORDS, option=None), dict(set_=None, option=WORDS)], ids=["set", "option"])
def test_words_of_the_command_line_become_fields(given):
    content = dict(model="x", data="y", output="z", rank=3, targets="q_proj,v_proj")
    add_settings(content, **given)
    found = method_settings(make(content), 7)
    wanted = {"lora_alpha": 5, "init_lora_weights": "pissa", "use_dora": True, "r": 3}
    assert found.items() >= wanted.items() and found["target_modules"] == ["q_proj", "v_proj"]


def test_keys_of_the_recipe_are_set_too_and_other_words_are_refused(base, data, tmp_path):  # noqa: F811
    content: dict = {}
    add_settings(content, ["warmup=0.5", "max_length=7"], None)
    assert content == {"warmup": 0.5, "max_length": 7}
    for verb in ("plan", "train"):
        for given, words in (
            (["--set", "lerning_rate=1"], "no key 'lerning_rate'; nearest: learning_rate"),
            (["--option", "lora_alhpa=5"], "nearest: lora_alpha"),
            (["--option", "lora_alpha"], "'lora_alpha' must be NAME=VALUE"),
        ):
            more = ["--data", data, "--output", str(tmp_path / "out")] if verb == "train" else []
            done = veneer(verb, "--model", base, *more, *given)
            assert done.returncode == 2 and words in done.stderr, (verb, given, done.stderr)


@pytest.mark.parametrize("method", ["lora", "adalora", "vera"])
def test_the_rank_means_the_same_as_in_training(method, tmp_path):
    given = ["--model", config_dir(tmp_path, SMALL), "--method", method, "--rank", "6", "--json"]
    planned = json.loads(veneer("plan", *given).stdout)
    recipe = make(dict(model="x", data="y", output="z", method=method, rank=6))
    config = method_config(recipe, "CAUSAL_LM", 10)
    rank = {"lora": dict(r=6), "adalora": dict(init_r=9, target_r=6), "vera": dict(r=6)}[method]
    assert {name: getattr(config, name) for name in rank} == rank
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**SMALL))
    assert planned["trainable"] == forecast(base, config, 1, 8).trainable


def test_paths_and_sizes_are_written_short():
    paths = tuple(f"model.layers.{i}.mlp.up_proj" for i in range(4)) + ("lm_head",)
    assert folded(paths) == ["model.layers.{0-3}.mlp.up_proj", "lm_head"]
    assert folded(("h.0.x", "h.2.x")) == ["h.{0,2}.x"]
    assert [size(n) for n in (12, 1500, 2_000_000, 141_500_000_000)] == ["12 bytes", "1.5 kB", "2 MB", "142 GB"]


def test_the_command_shows_and_prints_json():
    command = ["plan", "--model-type", "gpt2", "--rank", "8"]
    shown = veneer(*command)
    assert "294,912" in shown.stdout and "transformer.h.{0-11}.attn.c_attn" in shown.stdout
    found = json.loads(veneer(*command, "--json").stdout)
    assert found["trainable"] == 294_912 and found["memory"]["total"] > found["memory"]["step"] > 0
    memory = found["memory"]
    training = memory["optimizer"] + memory["step"] + memory["heap"]
    total = memory["base"] + memory["adapter"] + memory["process"] + max(training, memory["end"])
    assert total == memory["total"]
    wrong = veneer(*command, "--targets", "c_atn")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and "c_attn" in wrong.stderr
    wrong = veneer("plan", "--model", "no-such-model")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and "no-such-model" in wrong.stderr


def test_columns_have_other_names_in_the_plan_too(base, tmp_path):  # noqa: F811
    (tmp_path / "rows.csv").write_text("title,body\none,1\ntwo,22\n")
    command = ["plan", "--model", base, "--data", str(tmp_path / "rows.csv"), "--json"]
    found = veneer(*command, "--column", "question=title", "--column", "answer=body")
    assert json.loads(found.stdout)["data"]["kept"] == 2
    assert "has the columns title, body" in veneer(*command).stderr


def test_an_epoch_is_planned_as_it_is_trained(base, tmp_path):  # noqa: F811
    """With a row that is cut, one that is dropped, and weights."""
    rows = [{"question": "q" * n, "answer": "a" * (n % 7 + 1)} for n in range(20, 70, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = [{"path": str(tmp_path / "rows.jsonl"), "weight": 2}]
    recipe = make(
        dict(model=base, data=source, output=str(tmp_path / "out"), max_length=84, batch_size=3, accumulate=2)
    )
    epoch = epoch_of(recipe)
    report = train(recipe, console=Console(quiet=True))
    for name in COUNTED:
        assert getattr(epoch, name) == report["data"][name], name
    assert epoch.cut_rows > epoch.unlearned_rows > 0
    assert epoch.steps == report["steps"] and epoch.sequences == 2 * epoch.kept
    assert 2 * epoch.supervised_tokens == report["supervised_tokens"]
    assert sum(count for *_, count in epoch.lengths) == epoch.rows == len(rows)
    spelled = [length for first, last, count in epoch.lengths for length in range(first, last + 1)]
    assert all(int(length) in spelled for length in report["data"]["lengths"])
    command = ["--model", base, "--data", f"{tmp_path / 'rows.jsonl'}*2", "--batch-size", "3", "--accumulate", "2"]
    shown = veneer("plan", *command, "--max-length", "84", "--json")
    assert json.loads(shown.stdout)["data"] == json.loads(json.dumps(epoch.as_dict()))
    assert json.loads(shown.stdout)["length"] == -(-epoch.largest_batch // 3) < epoch.longest


def test_the_largest_batch_is_that_of_the_run(base, data, tmp_path, monkeypatch):  # noqa: F811
    seen = []
    add = Meter.add
    monkeypatch.setattr(Meter, "add", lambda self, real, learned: (seen.append(real), add(self, real, learned))[1])
    recipe = make(dict(model=base, data=data, output=str(tmp_path / "out"), batch_size=5, samples=0))
    train(recipe, console=Console(quiet=True))
    assert epoch_of(recipe).largest_batch == max(seen) > min(seen)


def test_plan_and_train_begin_with_the_same_settings():
    planned = {name: p.default for name, p in inspect.signature(plan).parameters.items()}
    trained = {name: field.default for name, field in Recipe.model_fields.items()}
    both = planned.keys() & trained.keys() - {"model", "data"}
    assert "batch_size" in both and {name: planned[name] for name in both} == {name: trained[name] for name in both}


@pytest.mark.parametrize("spelling", ["all-linear", "all_linear", "All-Linear"])
def test_all_linear_is_understood(spelling):
    assert make({"model": "x", "output": "y", "data": "z", "targets": spelling}).targets == "all-linear"


def test_the_plan_prints_the_remarks_of_training(base, tmp_path):  # noqa: F811
    """Those on rows that are cut or dropped, and those on what is unusual, as a run prints them."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"question": "q" * n, "answer": "a" * (n % 7)}) + "\n" for n in range(14))
    )
    settings = dict(model=base, data=str(tmp_path / "rows.jsonl"), max_length=30, max_steps=1)
    printed = io.StringIO()
    train(make(settings | {"output": str(tmp_path / "out")}), console=Console(file=printed, width=300))
    wanted = [line for line in printed.getvalue().splitlines() if "(the first:" in line]
    assert len(wanted) == 3 and "an empty answer" in wanted[-1]
    flags = ["--model", base, "--data", settings["data"], "--max-length", "30"]
    shown = veneer("plan", *flags, COLUMNS="300").stdout
    assert [line.strip() for line in shown.splitlines() if "(the first:" in line] == wanted
