"""The tutorial, row by row, on the real GPT-2 architecture."""

from __future__ import annotations

import os

import pytest
import torch

from veneer import (
    AutoPeftModelForCausalLM,
    BottleneckConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    TaskType,
    get_peft_model,
)

from . import models
from .models import output

COUNT = "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364"


def tutorial_config():
    return LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)


@pytest.fixture
def gpt2_small():
    """GPT-2 small without its memory."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config())


def test_the_count_is_the_tutorials(gpt2_small, capsys):
    model = get_peft_model(gpt2_small, tutorial_config())
    model.print_trainable_parameters()
    assert capsys.readouterr().out.strip() == COUNT
    assert model.peft_config["default"].target_modules == ["c_attn"]


def test_a_loop_by_hand_counts_the_same(gpt2_small):
    model = get_peft_model(gpt2_small, tutorial_config())
    trainable, total = 0, 0
    for _, parameter in model.named_parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            trainable += parameter.numel()
    assert (trainable, total) == (294_912, 124_734_720) == model.get_nb_trainable_parameters()


def test_the_theory_agrees(gpt2_small):
    plan = get_peft_model(gpt2_small, tutorial_config()).parameter_plan()
    assert len(plan.rows) == 12
    for row in plan.rows:
        assert (row.r, row.in_features, row.out_features) == (8, 768, 2304)
        assert row.expected == row.added == 8 * (768 + 2304) == 24_576
        assert row.formula == "8 x (768 + 2,304)"
    assert plan.expected == plan.total == 294_912
    assert "transformer.h.11.attn.c_attn" in str(plan) and "294,912" in str(plan)


def test_the_print_shows_where_the_adapters_are(gpt2_small):
    text = str(get_peft_model(gpt2_small, tutorial_config()))
    assert "(c_attn): Conv1D(nf=2304, nx=768) + LoRA[default](r=8, scaling=4, 768 -> 2304)" in text
    assert text.count("LoRA[default]") == 1  # twelve equal blocks are printed as one


def test_a_real_checkpoint_is_small(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = get_peft_model(GPT2LMHeadModel(GPT2Config()), tutorial_config())
    model.save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2_000_000


@pytest.mark.parametrize(
    "config",
    [
        tutorial_config(),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
        *(BottleneckConfig(task_type="CAUSAL_LM", placement=p) for p in ("houlsby", "pfeiffer", "parallel")),
    ],
    ids=["lora", "prefix", "houlsby", "pfeiffer", "parallel"],
)
def test_every_family_is_one_call(config, gpt2_small):
    model = get_peft_model(gpt2_small, config)
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < 0.06 * total


def saved(tmp_path):
    """A base model and a trained adapter on disk."""
    base = models.build("gpt2")
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    model = models.perturb(get_peft_model(base, tutorial_config()).eval())
    model.save_pretrained(tmp_path / "adapter")
    return model


def test_save_and_load_give_the_same_logits(tmp_path):
    model, batch = saved(tmp_path), models.inputs("gpt2")
    assert sorted(os.listdir(tmp_path / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(models.build("gpt2"), tmp_path / "adapter")
    assert torch.equal(output(loaded, batch), output(model, batch))
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training


def test_a_trainable_load_goes_on_learning(tmp_path):
    saved(tmp_path)
    loaded = PeftModel.from_pretrained(models.build("gpt2"), tmp_path / "adapter", is_trainable=True)
    assert loaded.get_nb_trainable_parameters()[0] > 0
    batch = models.inputs("gpt2")
    loaded(**batch, labels=batch["input_ids"]).loss.backward()


def test_base_and_adapter_in_one_call(tmp_path):
    model, batch = saved(tmp_path), models.inputs("gpt2")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(output(loaded, batch), output(model, batch), rtol=1e-5, atol=1e-5)
    ids = batch["input_ids"]
    assert loaded.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3).shape == (3, ids.shape[1] + 3)


def test_another_adapter_of_another_method_on_the_same_model(tmp_path):
    model = saved(tmp_path)
    model.add_adapter("mlp", BottleneckConfig(placement="pfeiffer"))
    model.load_adapter(tmp_path / "adapter", "again")
    model.set_adapter(["default", "mlp"])
    assert model.active_adapters == ["default", "mlp"]
    model.save_pretrained(tmp_path / "all")
    assert sorted(p.name for p in (tmp_path / "all").iterdir() if p.is_dir()) == ["again", "mlp"]
    model.delete_adapter("default")
    assert model.active_adapters == ["mlp"] and list(model.peft_config) == ["mlp", "again"]


def test_status(tmp_path):
    model = saved(tmp_path)
    status = model.get_model_status()
    assert status.num_adapter_layers == 2 and status.active_adapters == ["default"] and status.enabled
    assert status.requires_grad == {"default": True} and status.merged_adapters == []
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    model.merge_adapter()
    assert [layer.merged_adapters for layer in model.get_layer_status()] == [["default"]] * 2


def test_one_config_serves_two_architectures():
    """What is found for one model is not written into the config the caller holds."""
    config = LoraConfig(r=4, task_type="CAUSAL_LM")
    llama, gpt2 = (get_peft_model(models.build(name), config) for name in ("llama", "gpt2"))
    assert config == LoraConfig(r=4, task_type="CAUSAL_LM")
    assert llama.active_peft_config.target_modules == ["q_proj", "v_proj"]
    assert gpt2.active_peft_config.target_modules == ["c_attn"]


def test_a_layer_is_read_as_code_for_peft_reads_it():
    model = models.perturb(get_peft_model(models.build("gpt2"), tutorial_config()).eval())
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert layer.lora_A["default"].weight is layer.lora_A.default.weight and list(layer.lora_B) == ["default"]
    assert layer.weight is layer.base_layer.weight and layer.nf == 90
    before, batch = output(model, models.inputs("gpt2")), models.inputs("gpt2")
    layer.scaling["default"] *= 2
    assert layer.scaling == {"default": 8.0} and not torch.equal(output(model, batch), before)
    with pytest.raises(AttributeError):
        layer.lora_C  # noqa: B018


def test_neither_a_revision_nor_loading_is_written_into_the_callers_config(tmp_path):
    model = saved(tmp_path)
    config, before = tutorial_config(), tutorial_config()
    get_peft_model(models.build("gpt2"), config, revision="v2")
    assert config == before
    loaded = PeftModel.from_pretrained(models.build("gpt2"), tmp_path / "adapter", config=config)
    assert config == before and loaded.active_peft_config.inference_mode
    assert torch.equal(output(loaded, models.inputs("gpt2")), output(model, models.inputs("gpt2")))
