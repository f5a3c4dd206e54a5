"""One saved adapter takes the place of another in the same memory, also in compiled code."""

from __future__ import annotations

import copy

import pytest
import torch

import veneer
from veneer import CheckpointError, LoraConfig, PeftModel, VeneerError, get_peft_model
from veneer.model.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from . import models
from .models import output, perturb

TOLERANCE = dict(rtol=2e-4, atol=2e-5)
BATCH = models.inputs("llama")


def saved(path, seed: int, **settings):
    """A directory with an adapter, and its logits."""
    config = LoraConfig(**dict(r=4, target_modules=["q_proj", "down_proj"]) | settings)
    model = perturb(get_peft_model(models.build("llama"), config).eval(), seed=seed)
    model.save_pretrained(path)
    return path, output(model, BATCH)


def first(tmp_path, **settings):
    path, _ = saved(tmp_path / "first", 3, **settings)
    return PeftModel.from_pretrained(models.build("llama"), path)


OTHERS = {
    "same": {},
    "another-alpha": dict(lora_alpha=3),
    "lower-rank": dict(r=2, lora_alpha=5),
    "rslora": dict(r=3, use_rslora=True),
    "ranks-by-module": dict(rank_pattern={"q_proj": 1}, alpha_pattern={"down_proj": 2}),
    "fewer-modules": dict(target_modules=["q_proj"]),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_other_adapter_is_there_and_the_parameters_are_the_same_objects(other: str, tmp_path):
    model = first(tmp_path)
    path, expected = saved(tmp_path / "second", 9, **OTHERS[other])
    before = [(p, p.data_ptr()) for p in model.parameters()]
    hotswap_adapter(model, path)
    torch.testing.assert_close(output(model, BATCH), expected, **TOLERANCE)
    after = list(model.parameters())
    assert all(p is q and q.data_ptr() == place for (p, place), q in zip(before, after, strict=True))


@pytest.mark.parametrize("other", OTHERS)
def test_compiled_code_is_not_compiled_again(other: str, tmp_path):
    model = first(tmp_path)
    path, expected = saved(tmp_path / "second", 9, **OTHERS[other])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.inference_mode():
        output(compiled, BATCH)
        hotswap_adapter(compiled, path)
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(output(compiled, BATCH), expected, **TOLERANCE)


def test_a_higher_rank_needs_preparing(tmp_path):
    model = first(tmp_path)
    path, expected = saved(tmp_path / "second", 9, r=7)
    now = output(model, BATCH)
    with pytest.raises(CheckpointError, match="target_rank=7"):
        hotswap_adapter(model, path)
    assert torch.equal(output(model, BATCH), now)
    prepare_model_for_compiled_hotswap(model, target_rank=7)
    torch.testing.assert_close(output(model, BATCH), now, **TOLERANCE)
    hotswap_adapter(model, path)
    torch.testing.assert_close(output(model, BATCH), expected, **TOLERANCE)


@pytest.mark.parametrize(
    "settings",
    [{}, dict(use_rslora=True), dict(rank_pattern={"q_proj": 2}, lora_alpha=9), dict(use_dora=True)],
    ids=str,
)
def test_a_widened_adapter_trains_saves_and_loads(settings, tmp_path):
    model = first(tmp_path, **settings)
    model.set_requires_grad("default")
    now = output(model, BATCH)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    model.save_pretrained(tmp_path / "wide")
    again = PeftModel.from_pretrained(models.build("llama"), tmp_path / "wide")
    assert again.peft_config["default"].r == 6
    torch.testing.assert_close(output(again, BATCH), now, **TOLERANCE)


def test_convolutions_and_embeddings_swap_too(tmp_path):
    for name, targets in (("conv", ["first", "third", "head"]), ("gpt2", ["wte", "c_attn"])):
        batch, found = models.inputs(name), []
        for r in (4, 2):
            config = LoraConfig(r=r, target_modules=targets)
            model = perturb(get_peft_model(models.build(name), config).eval(), seed=r)
            model.save_pretrained(tmp_path / name / str(r))
            found.append(output(model, batch))
        model = PeftModel.from_pretrained(models.build(name), tmp_path / name / "2")
        prepare_model_for_compiled_hotswap(model, target_rank=4)
        hotswap_adapter(model, tmp_path / name / "4")
        torch.testing.assert_close(output(model, batch), found[0], **TOLERANCE)


def test_the_groups_of_a_convolution_are_widened_one_by_one(tmp_path):
    x, found = torch.randn(1, 4, 8, 8), []
    base = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2))
    for r in (4, 2):
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=r, target_modules=["0"]))
        perturb(model.eval(), seed=r).save_pretrained(tmp_path / str(r))
        found.append(model(x))
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "2")
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    torch.testing.assert_close(model(x), found[1], **TOLERANCE)
    for r in (4, 2):
        hotswap_adapter(model, tmp_path / str(r))
        torch.testing.assert_close(model(x), found[(4, 2).index(r)], **TOLERANCE)


def test_another_method_of_equal_settings_swaps(tmp_path):
    results = {}
    for seed in (3, 9):
        model = perturb(get_peft_model(models.build("llama"), veneer.IA3Config()).eval(), seed=seed)
        model.save_pretrained(tmp_path / str(seed))
        results[seed] = output(model, BATCH)
    model = PeftModel.from_pretrained(models.build("llama"), tmp_path / "3")
    hotswap_adapter(model, tmp_path / "9")
    assert torch.equal(output(model, BATCH), results[9])


REFUSED = {
    "more-modules": (dict(target_modules=["q_proj", "down_proj", "o_proj"]), "unexpected"),
    "dora": (dict(use_dora=True), "use_dora"),
    "pissa": (dict(init_lora_weights="pissa"), "init_lora_weights"),
}


@pytest.mark.parametrize("other", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_changes(other: str, tmp_path):
    model = first(tmp_path)
    settings, message = REFUSED[other]
    path, _ = saved(tmp_path / "second", 9, **settings)
    now = output(model, BATCH)
    with pytest.raises(CheckpointError, match=message):
        hotswap_adapter(model, path)
    assert torch.equal(output(model, BATCH), now)


def test_merged_and_missing_and_compiled_are_refused(tmp_path):
    model = first(tmp_path)
    path, _ = saved(tmp_path / "second", 9)
    with pytest.raises(VeneerError, match="no adapter is called 'other'"):
        hotswap_adapter(model, path, "other")
    model.merge_adapter()
    with pytest.raises(VeneerError, match="unmerge"):
        hotswap_adapter(model, path)
    model.unmerge_adapter()
    with pytest.raises(VeneerError, match="before compiling"):
        prepare_model_for_compiled_hotswap(torch.compile(model), target_rank=8)
    with pytest.raises(VeneerError, match="ranks above it"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    prompt = get_peft_model(models.build("llama"), veneer.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(VeneerError, match="no LoRA"):
        prepare_model_for_compiled_hotswap(prompt, target_rank=8)
