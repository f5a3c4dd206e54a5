"""`veneer train`: from a data file and a recipe to an adapter that can be trusted, or an error that says why not."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from veneer import LoraConfig, get_peft_model
from veneer.data.sources import Source
from veneer.errors import ConfigError, DataError, TrainingError, VeneerError
from veneer.train import trainer
from veneer.train.recipe import Recipe, make
from veneer.train.run import train

from . import models
from .chat_templates import TEMPLATES
from .forked import forked
from .test_train_chat import tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [{"question": f"{a} + {b}?", "answer": str(a + b)} for a in range(3, 9) for b in range(2, 6)]


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    """A tiny Llama on disk, with a byte-level tokenizer and ChatML."""
    where = tmp_path_factory.mktemp("base")
    words = tokenizer(TEMPLATES[0])
    words.pad_token = "<|im_end|>"
    words.save_pretrained(where)
    torch.manual_seed(0)
    ids = dict(pad_token_id=None, bos_token_id=None, eos_token_id=words.eos_token_id)
    models.llama(vocab_size=len(words), max_position_embeddings=256, **ids).save_pretrained(where)
    return str(where)


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def recipe(base: str, data, output, **settings):
    own = dict(model=base, data=data, output=str(output), batch_size=4, rank=4, learning_rate=1e-2)
    return make(own | settings)


def run(*args, **kwargs) -> dict:
    return train(recipe(*args, **kwargs), console=Console(quiet=True))


def tensors(where) -> dict[str, torch.Tensor]:
    return load_file(Path(where) / "adapter_model.safetensors")


def same(one, other) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_an_adapter_a_recipe_and_a_report(base, data, tmp_path):
    from huggingface_hub import ModelCard
    from transformers import AutoTokenizer

    from veneer import AutoPeftModelForCausalLM
    from veneer.data.encode import Encoder
    from veneer.data.shapes import understand

    report = run(base, data, tmp_path / "out", epochs=3, eval_split=4)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert report["steps"] == len(report["losses"]) == 15
    assert report["losses"][-1] < report["losses"][0] and report["eval"]["loss"] < report["eval"]["before"]["loss"]
    encoder = Encoder(AutoTokenizer.from_pretrained(base), 1024)
    rows = [encoder.tokens(understand("", row, "question")) for row in ROWS]
    assert report["data"]["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert report["data"]["supervised_tokens"] == sum(len(row["answer"]) + 1 for row in ROWS)
    assert 0 < report["supervised_tokens"] < report["real_tokens"] < 3 * report["data"]["tokens"]
    assert report["tokens_per_second"] == pytest.approx(report["real_tokens"] / report["train_seconds"])
    assert report["peak_rss_bytes"] > 1e8 and report["verified"] is True
    assert list((tmp_path / "out" / "logs").glob("events*"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.peft_config["default"].r == 4
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft" and {"lora", "veneer"} <= set(card.data.tags)
    assert f"{report['eval']['loss']:.4f}" in card.text and str(tmp_path) not in card.content


def test_evaluation_is_the_mean_over_all_learned_tokens(base, data, tmp_path):
    """Computed again, row by row, from the saved adapter."""
    from transformers import AutoTokenizer

    from veneer import AutoPeftModelForCausalLM
    from veneer.data.encode import Encoder
    from veneer.data.shapes import understand

    report = run(base, data, tmp_path / "out", eval_data=data, max_steps=4, eval_batch_size=5)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    total, count, hits = 0.0, 0, 0
    for row in ROWS:
        encoded = Encoder(AutoTokenizer.from_pretrained(base), 1024).tokens(understand("", row, "question"))
        logits = model(input_ids=torch.tensor([encoded["input_ids"]])).logits[0, :-1].log_softmax(-1)
        for scores, label in zip(logits, encoded["labels"][1:], strict=True):
            if label != -100:
                total, count, hits = total - float(scores[label]), count + 1, hits + int(scores.argmax() == label)
    assert report["eval"]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert report["eval"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert report["eval"]["accuracy"] == pytest.approx(hits / count)


def test_evaluation_holds_the_logits_of_few_rows(base, data, tmp_path, monkeypatch):
    """Of as many as a limit allows, at least one; the result is the same."""
    sizes: list[int] = []
    true = trainer.token_sums
    monkeypatch.setattr(trainer, "token_sums", lambda *both: (sizes.append(len(both[1])), true(*both))[1])
    settings = dict(eval_split=8, max_steps=1, eval_batch_size=8)
    whole = run(base, data, tmp_path / "whole", **settings)["eval"]
    assert set(sizes) == {8}
    sizes.clear()
    monkeypatch.setattr(trainer, "MOST_LOGITS", 1)
    parts = run(base, data, tmp_path / "parts", **settings)["eval"]
    assert set(sizes) == {1}
    for name in ("loss", "accuracy", "perplexity"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5), name


def test_the_saved_recipe_runs_again_to_the_same_bits(base, data, tmp_path):
    run(base, data, tmp_path / "one", max_steps=4, options={"lora_dropout": 0.1})
    again = make(yaml.safe_load((tmp_path / "one" / "recipe.yaml").read_text()) | {"output": str(tmp_path / "two")})
    train(again, console=Console(quiet=True))
    assert same(tmp_path / "one", tmp_path / "two")
    run(base, data, tmp_path / "three", max_steps=4, options={"lora_dropout": 0.1}, seed=1)
    assert not same(tmp_path / "one", tmp_path / "three")


def test_accumulation_and_checkpointing_change_nothing(base, data, tmp_path):
    plain = run(base, data, tmp_path / "one", epochs=2)
    settings = dict(batch_size=1, accumulate=4, gradient_checkpointing=True)
    other = run(base, data, tmp_path / "two", epochs=2, **settings)
    assert plain["losses"] == pytest.approx(other["losses"], rel=1e-3)


def test_packing_learns_the_same_tokens_in_fewer_sequences(base, data, tmp_path):
    packed = run(base, data, tmp_path / "one", packing=True, max_length=200, batch_size=1)
    plain = run(base, data, tmp_path / "two")
    assert packed["supervised_tokens"] == plain["supervised_tokens"]
    assert packed["real_tokens"] == plain["real_tokens"] and packed["steps"] < len(ROWS) / 4
    whole = run(base, data, tmp_path / "three", packing=True, max_length=200, batch_size=100)
    alone = run(base, data, tmp_path / "four", batch_size=100)
    assert whole["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def test_a_trial_of_packing_leaves_the_modes_of_modules(monkeypatch):
    """A base that takes no concatenated row raises in the trial; and parts may be in another mode than the whole."""
    from veneer.data.packing import goes_by_sequence

    model = get_peft_model(models.build("llama"), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)).train()
    model.get_base_model().model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 2
    assert goes_by_sequence(model, rows)
    assert {name: module.training for name, module in model.named_modules()} == before
    monkeypatch.setattr(model.get_base_model(), "forward", lambda **kwargs: torch.ones(()).view(2))
    assert not goes_by_sequence(model, rows)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_packing_is_refused_where_rows_would_see_each_other(base, data, tmp_path):
    from veneer.data.packing import check

    model = models.gpt2()
    model.forward = lambda *a, position_ids=None, _forward=model.forward, **k: _forward(
        *a, attention_mask=torch.ones_like(k["input_ids"]), **k
    )
    rows = [{"input_ids": list(range(3, 9)), "labels": list(range(3, 9))}] * 2
    check(models.gpt2(), rows)
    with pytest.raises(TrainingError, match="affect each other; set packing off"):
        check(model, rows)


def test_classification_trains_a_head(base, tmp_path):
    rows = [{"text": f"{word} {i}", "label": word} for i in range(12) for word in ("oak", "ash")]
    data = tmp_path / "rows.csv"
    data.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    report = run(base, str(data), tmp_path / "out", epochs=4, eval_data=str(data), accumulate=2)
    assert report["labels"] == ["ash", "oak"] and report["recipe"]["task"] == "classification"
    assert report["eval"]["accuracy"] == 1.0 and report["eval"]["before"]["accuracy"] < 1.0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and any("score" in name for name in tensors(tmp_path / "out"))


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_rows_longer_than_the_positions_of_the_model_are_cut(tmp_path, method: str):
    """Of GPT-2, whose positions are learned; a prompt takes some of them."""
    models.gpt2(vocab_size=300, n_positions=32).save_pretrained(tmp_path / "gpt2")
    tokenizer(TEMPLATES[0]).save_pretrained(tmp_path / "gpt2")
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"text": "x" * 100}) + "\n") * 8)
    settings = {"method": method, "max_length": 1024}
    if method == "prompt_tuning":
        settings |= {"rank": None, "options": {"num_virtual_tokens": 5}}
    report = run(str(tmp_path / "gpt2"), str(rows), tmp_path / "out", **settings)
    assert report["data"]["cut_rows"] == 8
    assert report["recipe"]["max_length"] == (27 if method == "prompt_tuning" else 32)


def test_weights_and_files_of_all_kinds(base, data, tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "rows.json").write_text(json.dumps({"rows": ROWS[:3]}))
    (tmp_path / "rows.tsv").write_text("q\ta\n007\t8\n")
    parquet.write_table(
        pyarrow.Table.from_pylist(
            [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]
        ),
        tmp_path / "m.parquet",
    )
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train-0.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "d" / "test.jsonl").write_text('{"prompt": "no", "completion": "no"}\n' * 50)
    sources = [
        {"path": data, "weight": 1.5},
        {"path": str(tmp_path / "rows.json"), "weight": 2},
        {"path": str(tmp_path / "rows.tsv"), "columns": {"question": "q", "answer": "a"}},
        str(tmp_path / "m.parquet"),
        str(tmp_path / "d"),
    ]
    report = run(base, sources, tmp_path / "out", batch_size=1)
    assert report["steps"] == 36 + 6 + 1 + 1 + 1 and report["data"]["rows"] == 24 + 3 + 1 + 1 + 1


def test_streaming_trains_without_holding_the_rows(base, data, tmp_path):
    settings = dict(streaming=True, max_steps=8, save_every=4)
    report = run(base, [{"path": data, "weight": 3}, data], tmp_path / "one", **settings)
    assert report["steps"] == 8 and report["losses"][-1] < report["losses"][0]
    run(base, [{"path": data, "weight": 3}, data], tmp_path / "two", **settings)
    assert same(tmp_path / "one", tmp_path / "two")


def test_early_stopping_and_the_best_checkpoint(base, data, tmp_path):
    settings = dict(eval_data=data, eval_every=1, early_stopping=2, learning_rate=3.0, schedule="constant", warmup=0)
    report = run(base, data, tmp_path / "out", epochs=20, **settings)
    steps = [entry["step"] for entry in report["eval"]["history"] if entry["step"]]
    losses = [entry["loss"] for entry in report["eval"]["history"] if entry["step"]]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 and report["eval"]["step"] == steps[best]
    assert same(tmp_path / "out", tmp_path / "out" / "checkpoints" / f"checkpoint-{steps[best]}")


KILLED = dict(epochs=4, save_every=5, options={"lora_dropout": 0.1}, eval_split=4, eval_every=5)


RESUMED: list[dict] = [
    {"lora_plus_ratio": 16},
    {"neftune_alpha": 5},
    {"layer_decay": 0.5, "rates": {"lora_A": 0.3}},
    {"optimizer": "lora_fa"},
    {"optimizer": "riemannian", "optimizer_options": {"reg": 0.1}},
    {"optimizer": "nadam", "optimizer_options": {"betas": [0.8, 0.9]}},
    {"optimizer": "adafactor"},
    {"optimizer": "adam32bit"},
    {"optimizer": "lion_8bit"},
    {"schedule": "cosine_with_restarts", "schedule_options": {"num_cycles": 3}},
    {"schedule": "reduce_lr_on_plateau", "schedule_options": {"patience": 0, "threshold": 0.9}},
]
"""Settings that have a state of their own, or draw numbers at random."""


@pytest.mark.parametrize("settings", RESUMED, ids=lambda settings: " ".join(map(str, settings.values())))
def test_every_setting_resumes_exactly(base, data, tmp_path, settings: dict):
    if "bit" in settings.get("optimizer", ""):
        pytest.importorskip("bitsandbytes")
    check_resume(base, data, tmp_path, 7, KILLED | settings)


@pytest.mark.parametrize("step", [3, 7, 11])
def test_killed_and_resumed_is_as_never_killed(base, data, tmp_path, step: int):
    check_resume(base, data, tmp_path, step, KILLED)


def check_resume(base, data, tmp_path, step: int, settings: dict) -> None:
    """A run that is killed at a step and resumed gives the bits of a run that is not."""
    whole = run(base, data, tmp_path / "whole", **settings)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def doomed() -> None:
        trainer._Epochs.on_step_end = on_step_end
        run(base, data, tmp_path / "killed", **settings)

    done = forked(doomed)
    assert done.returncode == -signal.SIGKILL, done.stderr
    half = tmp_path / "killed" / "checkpoints" / "checkpoint-19"  # a checkpoint the kill left half-written
    half.mkdir(parents=True)
    (half / "trainer_state.json").write_text("{")
    again = train(recipe(base, data, tmp_path / "killed", **settings), resume=True, console=Console(quiet=True))
    assert same(tmp_path / "whole", tmp_path / "killed")
    for key in ("losses", "steps", "real_tokens", "supervised_tokens"):
        assert again[key] == whole[key], key
    assert again["eval"]["loss"] == whole["eval"]["loss"]


def test_resuming_with_another_recipe_or_other_data_is_refused(base, data, tmp_path):
    run(base, data, tmp_path / "out", max_steps=4, save_every=2)
    with pytest.raises(ConfigError, match="learning_rate: 0.01, now 0.5"):
        train(recipe(base, data, tmp_path / "out", max_steps=4, learning_rate=0.5), resume=True)
    Path(data).write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    with pytest.raises(ConfigError, match="the data has changed since the run was started"):
        train(recipe(base, data, tmp_path / "out", max_steps=4, save_every=2), resume=True)


def test_nothing_of_an_earlier_run_is_lost_unless_asked(base, data, tmp_path):
    run(base, data, tmp_path / "out", max_steps=2)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already holds adapter_model.safetensors.*--resume.*--overwrite"):
        run(base, data, tmp_path / "out", max_steps=2)
    before = (tmp_path / "out" / "report.json").read_bytes()
    for wrong in ({"data": "nothing.jsonl"}, {"targets": ["q_prj"]}):
        with pytest.raises(VeneerError, match="nearest|no data"):
            train(recipe(base, wrong.pop("data", data), tmp_path / "out", **wrong), overwrite=True)
        assert (tmp_path / "out" / "report.json").read_bytes() == before
    train(recipe(base, data, tmp_path / "out", max_steps=1), overwrite=True, console=Console(quiet=True))
    assert len(list((tmp_path / "out" / "logs").iterdir())) == 1
    assert json.loads((tmp_path / "out" / "report.json").read_text())["steps"] == 1
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


# What cannot be trusted


def failing(error, words: str, base, data, output, **settings):
    with pytest.raises(error, match=words):
        run(base, data, output, **settings)
    assert not (Path(output) / "report.json").exists() and not (Path(output) / "adapter_model.safetensors").exists()


def test_untrustworthy_runs_end_with_the_reason(base, data, tmp_path, monkeypatch):
    failing(DataError, "all labels are masked", base, data, tmp_path / "a", max_length=8)
    failing(DataError, "too long for max_length", base, data, tmp_path / "b", max_length=8, long_rows="drop")
    settings = dict(learning_rate=1e30, warmup=0, max_grad_norm=0, schedule="constant", max_steps=8)
    failing(TrainingError, "at step [2-8].*lower learning_rate", base, data, tmp_path / "c", **settings)
    failing(TrainingError, "did not change", base, data, tmp_path / "d", learning_rate=1e-50, max_steps=1)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    failing(DataError, "holds no rows", base, str(empty), tmp_path / "e")


def test_a_run_that_learns_nothing_any_more_ends_with_the_reason(base, data, tmp_path, monkeypatch):
    """As with a rate so high that every activation is saturated. A loss of 0 needs no gradient."""
    true = trainer.ExactTrainer.compute_loss

    def without_gradient(scale: float):
        def compute_loss(self, *args, **kwargs):
            loss = true(self, *args, **kwargs)
            return scale * loss.detach() + 0 * loss

        return compute_loss

    monkeypatch.setattr(trainer.ExactTrainer, "compute_loss", without_gradient(1.0))
    words = "the loss is 5.* but its gradient 0, as in the steps before, at step 3: the run stops. Try a lower"
    failing(TrainingError, words, base, data, tmp_path / "dead", max_steps=5)
    monkeypatch.setattr(trainer.ExactTrainer, "compute_loss", without_gradient(0.0))
    failing(TrainingError, "did not change", base, data, tmp_path / "done", max_steps=5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"question": "x", "answer": 5}', r"rows.jsonl:1: answer must be text, not 5"),
        ('{"questions": "x", "answer": "y"}', r"columns questions, answer \(questions; nearest: question\)"),
        ('{"question": "x"', "rows.jsonl:1 is not JSON"),
        ('["x"]', "rows.jsonl:1 holds a str"),
        ('{"messages": [{"content": "x"}]}', "a message is {role, content}"),
        ('{"text": "x", "label": "a"}', "a classifier needs two classes"),
        ('{"text": "x", "label": null}', "label must be a name or a whole number"),
    ],
)
def test_damaged_rows_are_named(base, tmp_path, content: str, words: str):
    (tmp_path / "rows.jsonl").write_text(content + "\n")
    failing(DataError, words, base, str(tmp_path / "rows.jsonl"), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lerning_rate": 1}, "no key 'lerning_rate'; nearest: learning_rate"),
        ({"data": {"path": "x", "wieght": 2}}, "no key 'data.0.wieght'; nearest: weight"),
        ({"batch_size": 0}, "^batch_size = 0 must be at least 1$"),
        ({"epochs": 0}, "^epochs = 0 must be more than 0$"),
        ({"epochs": "many"}, "^epochs = 'many' must be a number$"),
        ({"rank": 2.5}, "^rank = 2.5 must be a whole number$"),
        ({"packing": "sometimes"}, "^packing = 'sometimes' must be true or false$"),
        ({"options": 3}, "^options = 3 must be a mapping of names to values$"),
        ({"lr": 1}, "no key 'lr'; here it is learning_rate"),
        ({"lora_alpha": 3}, "no key 'lora_alpha': it is a setting of lora and belongs under options"),
        (
            {"rank": 0, "epochs": 0},
            "^the recipe has 2 errors:\n  rank = 0 must be at least 1\n  epochs = 0 must be more",
        ),
        ({"streaming": True}, "set max_steps"),
        ({"early_stopping": 2}, "give eval_data or eval_split"),
        ({"schedule": "cosin"}, "^schedule = 'cosin' must be linear, cosine, constant, .* or reduce_lr_on_plateau$"),
        ({"schedule": "reduce_lr_on_plateau"}, "follows the evaluation loss; give eval_data or eval_split"),
        ({"neftune_alpha": 5, "packing": True}, "set packing off"),
        ({"push_to_hub": "name"}, "^push_to_hub = 'name': must be owner/name$"),
        ({"wandb": True}, "no key 'wandb'; here it is report_to"),
        ({"report_to": "wandbb"}, "^report_to.0 = 'wandbb' must be wandb, trackio, mlflow or swanlab$"),
    ],
)
def test_a_typo_in_a_recipe_names_the_nearest(settings: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        make(dict(model="m", data="d", output="o") | settings)


def slips(word: str) -> set[str]:
    """Words that one slip makes of another: a letter left out, doubled, or two exchanged."""
    cuts = [(word[:i], word[i:]) for i in range(len(word))]
    return {a + b[1:] for a, b in cuts} | {a + b[0] + b for a, b in cuts} | {a + b[1::-1] + b[2:] for a, b in cuts}


def test_every_slip_in_a_key_is_an_error_that_names_the_key():
    own = {"model": "m", "data": "d", "output": "o"}
    count = 0
    for key in Recipe.model_fields:
        for slip in slips(key) - set(Recipe.model_fields) - {""}:
            with pytest.raises(ConfigError, match=rf"no key '{slip}'; nearest: .*\b{key}\b"):
                make(own | {slip: 1})
            count += 1
    for key in Source.model_fields:
        for slip in slips(key) - set(Source.model_fields):
            with pytest.raises(ConfigError, match=rf"no key 'data.0.{slip}'; nearest: .*\b{key}\b"):
                make(own | {"data": {"path": "x", slip: 1}})
            count += 1
    assert count > 900


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "lorra"}, "no method 'lorra'; nearest: lora"),
        ({"targets": "q_prj"}, "q_prj.*q_proj"),
        ({"options": {"lora_alfa": 3}}, "lora_alfa.*lora_alpha"),
        ({"method": "ia3"}, "ia3 has no rank"),
        ({"options": {"r": 3}}, "both options and rank or targets set r"),
        ({"method": "prompt_tuning", "rank": None, "targets": "q_proj"}, "has no target modules"),
        ({"save_every": 3, "eval_every": 2, "eval_split": 2}, "save_every = 3 must be a multiple of eval_every = 2"),
        ({"eval_split": 24}, "both parts need at least one"),
        ({"packing": True, "method": "prompt_tuning", "rank": None}, "packing off"),
    ],
)
def test_what_a_method_or_run_cannot_do_is_refused(base, data, tmp_path, settings: dict, words: str):
    failing(VeneerError, words, base, data, tmp_path / "out", **settings)


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2, "batch_size": 2}, {"packing": True, "batch_size": 2}])
def test_the_fast_paths_learn_the_same(base, data, tmp_path, monkeypatch, settings: dict):
    """Rows end to end and by sequence, or padded and all plain: the same losses and the same adapter."""
    from veneer.ops import attention

    calls, true = [], attention._one_length
    monkeypatch.setattr(attention, "_one_length", lambda *args: (calls.append(1), true(*args))[1])
    fast = run(base, data, tmp_path / "fast", options={"lora_dropout": 0.0}, **settings)
    assert calls
    calls.clear()
    plain = run(base, data, tmp_path / "plain", options={"lora_dropout": 0.0}, fast=False, **settings)
    assert not calls
    assert fast["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert fast["real_tokens"] == plain["real_tokens"]
    for name, tensor in tensors(tmp_path / "fast").items():
        torch.testing.assert_close(tensor, tensors(tmp_path / "plain")[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", ["prompt_tuning", "loreft"])
def test_methods_that_look_at_whole_rows_get_them_padded(base, data, tmp_path, monkeypatch, method: str):
    from veneer.data import collate

    flat = []
    monkeypatch.setattr(collate, "joined", lambda rows: flat.append(rows))
    settings = {"rank": None if method == "prompt_tuning" else 2}
    run(base, data, tmp_path / "out", method=method, max_steps=1, **settings)
    assert not flat
