"""A second stage: a run that starts from a saved adapter, which it trains on or merges into the base model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from veneer import AutoPeftModelForCausalLM, PeftModel
from veneer.cli import app
from veneer.core.config import Config
from veneer.core.remainder import TRAINING_NAME
from veneer.errors import BaseMismatch, CheckpointError, ConfigError, NotMergeable, NotResumable
from veneer.files.read import WEIGHTS_NAME
from veneer.train.recipe import make
from veneer.train.run import train

from . import models
from .test_train import base, data, recipe, run, same  # noqa: F401 (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = dict(max_steps=2, eval_split=6, seed=0)
"""A short run that is evaluated before its first step and after its last one."""
METHODS = {
    "lora": {},
    "dora": {},
    "adalora": {},
    "pissa": dict(method="lora", options={"init_lora_weights": "pissa"}),
    "ia3": dict(rank=None),
    "oft": dict(rank=None, options={"oft_block_size": 5}, targets=["q_proj"]),
    "prompt_tuning": dict(rank=None),
    "p_tuning": dict(rank=None),
    "prefix_tuning": dict(rank=None, options={"prefix_projection": True}),
    "vblora": dict(rank=2, options={"vector_length": 2, "num_vectors": 9, "save_only_topk_weights": True}),
}


def first(base: str, data: str, out: Path, name: str = "lora", **more) -> dict:  # noqa: F811
    return run(base, data, out, **({"method": name} | METHODS[name] | QUIET | more))


def second(start: Path, data: str, out: Path, **more) -> dict:  # noqa: F811
    from rich.console import Console

    content = dict(start_from=str(start), data=data, output=str(out), batch_size=4, learning_rate=1e-2)
    return train(make(content | QUIET | more), console=Console(quiet=True))


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_trains_an_adapter_on(base, data, tmp_path, name):  # noqa: F811
    """From the loss at which it was saved; the adapter that it starts from and the base model stay as they are."""
    before = first(base, data, tmp_path / "one", name)
    originals = files(tmp_path / "one"), files(Path(base))
    after = second(tmp_path / "one", data, tmp_path / "two")
    assert after["eval"]["before"]["loss"] == pytest.approx(before["eval"]["loss"], rel=1e-5)
    assert after["verified"] and after["steps"] == 2
    assert (files(tmp_path / "one"), files(Path(base))) == originals
    kept = yaml.safe_load((tmp_path / "two" / "recipe.yaml").read_text())
    assert kept["start_mode"] == "continue" and kept["model"] == base
    assert kept["method"] == METHODS[name].get("method", name)
    config = Config.from_pretrained(tmp_path / "two")
    assert config.peft_type == Config.from_pretrained(tmp_path / "one").peft_type


def test_the_saved_recipe_repeats_a_second_stage(base, data, tmp_path):  # noqa: F811
    first(base, data, tmp_path / "one")
    second(tmp_path / "one", data, tmp_path / "two")
    content = yaml.safe_load((tmp_path / "two" / "recipe.yaml").read_text())
    train(make(content | {"output": str(tmp_path / "three")}))
    assert same(tmp_path / "two", tmp_path / "three")


def test_another_method_is_trained_on_the_merged_base(base, data, tmp_path):  # noqa: F811
    """From the loss of the first adapter; its directory holds all that its use needs."""
    before = first(base, data, tmp_path / "one")
    after = second(tmp_path / "one", data, tmp_path / "two", method="dora", rank=3)
    assert after["eval"]["before"]["loss"] == pytest.approx(before["eval"]["loss"], rel=1e-5)
    assert after["eval"]["loss"] < before["eval"]["loss"] and after["verified"]
    shutil.rmtree(tmp_path / "one")

    out = str(tmp_path / "two")
    shown = CliRunner().invoke(app, ["eval", "--adapter", out, "--data", data, "--json"], catch_exceptions=False)
    results = json.loads(shown.stdout)["results"]
    assert results["two"]["loss"] < results["base"]["loss"]
    done = CliRunner().invoke(app, ["generate", "3 + 4?", "--adapter", out, "--max-new-tokens", "2"])
    assert done.exit_code == 0 and "merged in" in done.output
    done = CliRunner().invoke(app, ["chat", "--adapter", out, "--max-new-tokens", "2"], input="3 + 4?\n")
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["verify", out])
    assert done.exit_code == 0 and "ok     same outputs" in done.output
    done = CliRunner().invoke(app, ["merge", out, "--out", str(tmp_path / "merged")], catch_exceptions=False)
    assert done.exit_code == 0 and "two/start was merged first" in done.output.replace("\n", "")
    assert base in done.output.replace("\n", "")
    assert {path.name for path in tmp_path.iterdir()} >= {"merged", "two"}
    assert not list(tmp_path.glob(".earlier-*"))

    from transformers import AutoModelForCausalLM

    loaded = AutoPeftModelForCausalLM.from_pretrained(out)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    batch = models.inputs("llama")
    torch.testing.assert_close(models.output(merged, batch), models.output(loaded, batch), rtol=1e-4, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base)
    with loaded.disable_adapter():
        assert not torch.allclose(models.output(loaded, batch), models.output(plain, batch), atol=1e-4)
    with pytest.raises(BaseMismatch, match="earlier adapter merged in"):
        PeftModel.from_pretrained(plain, out)


def test_a_plan_is_for_the_method_that_is_trained_on(base, data, tmp_path):  # noqa: F811
    first(base, data, tmp_path / "one", "ia3")
    done = CliRunner().invoke(app, ["plan", "--start-from", str(tmp_path / "one"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["method"] == "ia3"


def test_a_third_stage(base, data, tmp_path):  # noqa: F811
    """On a base model into which two are merged, and from there on."""
    first(base, data, tmp_path / "one")
    second(tmp_path / "one", data, tmp_path / "two", start_mode="merge", rank=2)
    third = second(tmp_path / "two", data, tmp_path / "three", start_mode="merge", rank=3, targets=["k_proj"])
    fourth = second(tmp_path / "three", data, tmp_path / "four")
    assert fourth["eval"]["before"]["loss"] == pytest.approx(third["eval"]["loss"], rel=1e-5)
    for name in ("one", "two", "three"):
        shutil.rmtree(tmp_path / name)
    assert (tmp_path / "four" / "start" / "start" / WEIGHTS_NAME).is_file()
    shown = CliRunner().invoke(app, ["verify", str(tmp_path / "four")])
    assert shown.exit_code == 0, shown.output
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "four"), "--out", str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "four")
    batch = models.inputs("llama")
    torch.testing.assert_close(models.output(merged, batch), models.output(loaded, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["continue", "merge"])
def test_only_the_adapter_is_trained(base, data, tmp_path, mode, monkeypatch):  # noqa: F811
    from veneer.train import run as runs

    first(base, data, tmp_path / "one")
    seen = {}
    build = runs._build_trainer

    def built(*args):
        trainer = build(*args)
        for name, parameter in trainer.model.named_parameters():
            seen[name] = parameter, parameter.detach().clone(), parameter.requires_grad
        return trainer

    monkeypatch.setattr(runs, "_build_trainer", built)
    second(tmp_path / "one", data, tmp_path / "two", start_mode=mode, best=False)
    for name, (parameter, before, is_trained) in seen.items():
        assert is_trained == (".adapters." in name), name
        assert torch.equal(parameter, before) != is_trained, name


def test_a_resumed_second_stage_equals_an_uninterrupted_one(base, data, tmp_path):  # noqa: F811
    first(base, data, tmp_path / "one")
    whole = dict(max_steps=4, eval_every=2, save_every=2, schedule="constant", warmup=0)
    second(tmp_path / "one", data, tmp_path / "two", **whole)
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    shutil.rmtree(tmp_path / "three" / "checkpoints" / "checkpoint-4")
    content = yaml.safe_load((tmp_path / "two" / "recipe.yaml").read_text())
    train(make(content | {"output": str(tmp_path / "three")}), resume=True)
    assert same(tmp_path / "two", tmp_path / "three")


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(rank=7), "r = 7 contradicts the adapter"),
        (dict(targets=["k_proj"]), "target_modules = ['k_proj'] contradicts the adapter"),
        (dict(options={"lora_alpha": 3}), "lora_alpha = 3 contradicts the adapter"),
        (dict(options={"lora_alfa": 3}), "lora has no setting 'lora_alfa'"),
        (dict(method="dora", start_mode="continue"), "method = 'dora' contradicts the adapter"),
        (dict(start_mode="stack"), "start_mode = 'stack' must be continue or merge"),
    ],
)
def test_a_recipe_that_contradicts_the_adapter_is_refused(base, data, tmp_path, given, message):  # noqa: F811
    first(base, data, tmp_path / "one")
    with pytest.raises(ConfigError) as error:
        second(tmp_path / "one", data, tmp_path / "two", **given)
    assert message in str(error.value)
    assert not (tmp_path / "two" / "recipe.yaml").exists()


def test_what_may_change_changes(base, data, tmp_path):  # noqa: F811
    first(base, data, tmp_path / "one", "adalora")
    second(tmp_path / "one", data, tmp_path / "two", max_steps=5, options={"lora_dropout": 0.1, "tfinal": 1})
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert (config["lora_dropout"], config["total_step"], config["tfinal"]) == (0.1, 5, 1)


def test_what_cannot_start_a_run_is_refused(base, data, tmp_path):  # noqa: F811
    """No adapter, an adapter of another base model, and one that cannot be merged."""
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        second(tmp_path, data, tmp_path / "two", model=base)
    first(base, data, tmp_path / "one")
    torch.manual_seed(1)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    model = models.llama(vocab_size=len(tensors["model.embed_tokens.weight"]), max_position_embeddings=256)
    model.save_pretrained(other)
    for mode in ("continue", "merge"):
        with pytest.raises(BaseMismatch, match="another base model"):
            second(tmp_path / "one", data, tmp_path / "two", model=str(other), start_mode=mode)
    first(base, data, tmp_path / "prompt", "prompt_tuning")
    with pytest.raises(NotMergeable, match="train it on instead"):
        second(tmp_path / "prompt", data, tmp_path / "two", method="lora")
    pytest.importorskip("bitsandbytes")
    with pytest.raises(NotMergeable, match="quantised weights"):
        second(tmp_path / "one", data, tmp_path / "two", method="dora", quantise="int8")
    assert not (tmp_path / "two" / "recipe.yaml").exists()


def test_an_earlier_adapter_that_was_changed_is_refused(base, data, tmp_path):  # noqa: F811
    first(base, data, tmp_path / "one")
    first(base, data, tmp_path / "other", seed=3)
    second(tmp_path / "one", data, tmp_path / "two", method="dora")
    out = str(tmp_path / "two")
    shutil.copyfile(tmp_path / "other" / WEIGHTS_NAME, tmp_path / "two" / "start" / WEIGHTS_NAME)
    for arguments in (["generate", "a", "--adapter", out], ["merge", out, "--out", str(tmp_path / "merged")]):
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, CheckpointError) and "another adapter" in str(done.exception)
    assert not (tmp_path / "merged").exists()
    shutil.rmtree(tmp_path / "two" / "start")
    done = CliRunner().invoke(app, ["generate", "a", "--adapter", out])
    assert "start" in str(done.exception) and "adapter_config.json" in str(done.exception)


def test_stages_that_differ_are_not_loaded_together(base, data, tmp_path):  # noqa: F811
    first(base, data, tmp_path / "one")
    second(tmp_path / "one", data, tmp_path / "two", method="dora")
    done = CliRunner().invoke(
        app, ["eval", "--adapter", str(tmp_path / "one"), "--adapter", str(tmp_path / "two"), "--data", data]
    )
    assert "load them one at a time" in str(done.exception)


# The file beside the adapter


def test_without_the_file_beside_it_a_projection_is_only_used(base, data, tmp_path):  # noqa: F811
    first(base, data, tmp_path / "one", "prefix_tuning")
    assert (tmp_path / "one" / TRAINING_NAME).is_file()
    assert load_file(tmp_path / "one" / WEIGHTS_NAME).keys() == {"prompt_embeddings"}
    (tmp_path / "one" / TRAINING_NAME).unlink()
    with pytest.raises(NotResumable, match="the projection cannot be recovered"):
        second(tmp_path / "one", data, tmp_path / "two")
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "one")


def test_the_file_beside_another_adapter_is_not_read(base, data, tmp_path):  # noqa: F811
    first(base, data, tmp_path / "one", "p_tuning")
    first(base, data, tmp_path / "other", "p_tuning", seed=5)
    shutil.copyfile(tmp_path / "other" / TRAINING_NAME, tmp_path / "one" / TRAINING_NAME)
    with pytest.raises(NotResumable):
        second(tmp_path / "one", data, tmp_path / "two")


def test_a_method_with_nothing_to_keep_writes_no_file(base, data, tmp_path):  # noqa: F811
    first(base, data, tmp_path / "one")
    assert not (tmp_path / "one" / TRAINING_NAME).exists()


def test_saving_over_it_removes_a_stale_file(base, data, tmp_path):  # noqa: F811
    first(base, data, tmp_path / "one", "prefix_tuning")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "one")
    assert not (tmp_path / "one" / TRAINING_NAME).exists()


@pytest.mark.parametrize(
    "settings",
    [
        dict(method="adalora", options={"tinit": 1, "tfinal": 1}),
        dict(method="prefix_tuning", rank=None, options={"prefix_projection": True}),
        dict(method="p_tuning", rank=None),
        dict(
            method="adamss",
            rank=None,
            options=dict(r=8, use_asa=True, init_warmup=1, final_warmup=7, mask_interval=2, asa_target_subspaces=3),
        ),
    ],
    ids=lambda settings: settings["method"],
)
def test_what_a_method_observes_survives_a_resume(base, data, tmp_path, settings):  # noqa: F811
    """The best checkpoint is loaded in the end, which they could not do before."""
    whole = dict(eval_data=data, max_steps=8, eval_every=4, save_every=4, schedule="constant", warmup=0)
    run(base, data, tmp_path / "one", **settings, **whole)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "checkpoint-8")
    train(recipe(base, data, tmp_path / "two", **settings, **whole), resume=True)
    assert same(tmp_path / "one", tmp_path / "two")
