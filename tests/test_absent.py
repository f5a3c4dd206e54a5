"""Saved adapters that name modules which the model lacks: the tensors decide, and what is passed over is told."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer import CheckpointError, LoraConfig, PeftModel, TargetError, get_peft_model

from . import models
from .forked import veneer
from .models import output
from .test_train import base, data  # noqa: F401 (fixtures)


@pytest.fixture
def saved(tmp_path):
    """A LoRA as another program writes it: without veneer's notes on its settings."""
    model = get_peft_model(
        models.build("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path, output(model.eval(), models.inputs("llama"))


def rewrite(where, **settings):
    file = where / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def add(where, *paths: str):
    tensors = load_file(where / "adapter_model.safetensors")
    for path in paths:
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.ones(2, 3)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.ones(3, 2)
    save_file(tensors, where / "adapter_model.safetensors")


SETTINGS = {
    "target_modules": ["q_proj", "v_proj", "experts", "router"],
    "exclude_modules": ["vision"],
    "rank_pattern": {"nothing": 4},
    "alpha_pattern": {"nothing": 4},
    "modules_to_save": ["resampler"],
}


@pytest.mark.parametrize("field", SETTINGS)
def test_a_name_without_module_and_tensors_is_passed_over_and_told(saved, field: str):
    where, expected = saved
    rewrite(where, **{field: SETTINGS[field]})
    with pytest.warns(UserWarning, match=f"names what LlamaForCausalLM lacks, which is passed over:\n  {field}: "):
        model = PeftModel.from_pretrained(models.build("llama"), where)
    assert torch.equal(output(model, models.inputs("llama")), expected)
    model.save_pretrained(where / "again")  # describes the adapter as it is on this model
    PeftModel.from_pretrained(models.build("llama"), where / "again")


def test_a_name_that_other_fields_leave_nothing_of(saved):
    """As PEFT writes `["q_proj", "v_proj", "lm_head"]` with `layers_to_transform`: the head was never adapted."""
    where, expected = saved
    rewrite(where, target_modules=["q_proj", "v_proj", "lm_head"], layers_to_transform=[0, 1])
    with pytest.warns(UserWarning, match="target_modules: 'lm_head'"):
        model = PeftModel.from_pretrained(models.build("llama"), where)
    assert torch.equal(output(model, models.inputs("llama")), expected)


def test_a_further_adapter(saved):
    where, expected = saved
    rewrite(where, target_modules=SETTINGS["target_modules"])
    model = get_peft_model(models.build("llama"), LoraConfig(r=2)).eval()
    with pytest.warns(UserWarning, match="target_modules: 'experts'"):
        model.load_adapter(where, "other")
    model.set_adapter("other")
    assert torch.equal(output(model, models.inputs("llama")), expected)


def test_tensors_of_modules_that_the_model_lacks_need_a_word(saved):
    where, expected = saved
    rewrite(where, target_modules=["q_proj", "v_proj", "resampler"])
    add(where, "model.vision.layers.0.q_proj", "model.resampler")
    with pytest.raises(CheckpointError, match="has no module 'resampler'.*allow_absent=True"):
        PeftModel.from_pretrained(models.build("llama"), where)
    with pytest.warns(UserWarning, match="4 of the file's 12 tensors are for modules that LlamaForCausalLM lacks"):
        model = PeftModel.from_pretrained(models.build("llama"), where, allow_absent=True)
    assert torch.equal(output(model, models.inputs("llama")), expected)


def test_a_module_that_the_model_has_must_be_whole(saved):
    """A tensor too many or too few for it is no matter of what the model lacks."""
    where, _ = saved
    add(where, "model.layers.0.self_attn.k_proj")
    for allow in (False, True):
        with pytest.raises(CheckpointError, match="unexpected"):
            PeftModel.from_pretrained(models.build("llama"), where, allow_absent=allow)
    rewrite(where, target_modules=["q_proj", "v_proj", "k_proj", "o_proj"])
    with pytest.raises(CheckpointError, match="missing"):
        PeftModel.from_pretrained(models.build("llama"), where, allow_absent=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(target_modules=["q_proj", "lm_head"], layers_to_transform=[1]), "layers_to_transform = \\[1\\]"),
        (dict(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]), "exclude_modules = \\['v_proj'\\]"),
    ],
)
def test_a_new_adapter_must_use_each_of_its_names(settings: dict, words: str):
    with pytest.raises(TargetError, match=f"(?s)adapts nothing, because {words} leave none of the modules it matches"):
        get_peft_model(models.build("llama"), LoraConfig(r=2, **settings))


@pytest.fixture
def beyond(base, tmp_path):  # noqa: F811
    """An adapter that has tensors for a module of another architecture."""
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    add(tmp_path / "adapter", "model.layers.0.experts")
    rewrite(tmp_path / "adapter", target_modules=["q_proj", "experts"], base_model_name_or_path=base)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "{adapter}"],
        ["merge", "{adapter}", "--out", "{out}"],
        ["generate", "hello", "--adapter", "{adapter}", "--max-new-tokens", "2"],
        ["chat", "--adapter", "{adapter}", "--max-new-tokens", "2"],
        ["eval", "--adapter", "{adapter}", "--data", "{data}", "--limit", "2"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_verb_passes_over_what_is_absent_if_it_is_asked(arguments, beyond, data, tmp_path):  # noqa: F811
    places = dict(adapter=beyond, out=tmp_path / "out", data=data)
    words = [argument.format(**places) for argument in arguments]
    refused = veneer(*words, given="hello\n")
    assert refused.returncode == 2 and "--allow-absent" in refused.stderr + refused.stdout
    done = veneer(*words, "--allow-absent", given="hello\n")
    assert done.returncode == 0, done.stderr
    told = done.stderr
    assert "warning: the adapter's config names what LlamaForCausalLM lacks" in told and "'experts'" in told
    assert "warning: 2 of the file's 6 tensors are for modules that LlamaForCausalLM lacks" in told
    assert "UserWarning" not in told and "model.layers.0.experts.lora_A.weight" in told
