"""Models whose vocabulary was resized: the rows of new tokens are saved with the adapter, loaded and merged."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from veneer import CheckpointError, LoraConfig, PeftModel, get_peft_model
from veneer.merging.merge import merge

from . import models
from .models import perturb

NEW = 3
"""Tokens that are added."""


@pytest.fixture(params=["llama", "tied", "gpt2"])
def base(request, tmp_path) -> str:
    torch.manual_seed(0)
    getattr(models, request.param)().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def resized(base: str):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + NEW)
    return model


def lora(base: str, **settings) -> LoraConfig:
    embedding = "wte" if "transformer" in str(AutoModelForCausalLM.from_pretrained(base)) else "embed_tokens"
    attention = "c_attn" if embedding == "wte" else "q_proj"
    for name, value in settings.items():
        settings[name] = [embedding if entry == "embedding" else entry for entry in value]
        settings[name] = [attention if entry == "attention" else entry for entry in settings[name]]
    return LoraConfig(task_type="CAUSAL_LM", r=2, **settings)


@torch.no_grad()
def logits(model):
    ids = torch.tensor([[5, 66, 67, 69, 7]])  # with tokens that were added
    return model.eval()(input_ids=ids).logits


CASES = {
    "plain": dict(target_modules=["attention"]),
    "on the embedding": dict(target_modules=["attention", "embedding"]),
    "on both": dict(target_modules=["attention", "embedding", "lm_head"]),
    "a copy": dict(target_modules=["attention"], modules_to_save=["embedding"]),
}


@pytest.mark.parametrize("case", CASES)
def test_new_rows_come_back_and_are_merged(base: str, case: str, tmp_path):
    config = lora(base, **CASES[case])
    model = perturb(get_peft_model(resized(base), config), "default", 3)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")

    torch.manual_seed(2)
    fresh = AutoModelForCausalLM.from_pretrained(base)
    fresh.resize_token_embeddings(fresh.config.vocab_size + NEW)  # other values in the new rows
    torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter")), expected)

    merge([tmp_path / "adapter"], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 67 + NEW
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_a_base_that_was_not_resized_is_told_how(base: str, tmp_path):
    get_peft_model(resized(base), lora(base, target_modules=["attention"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"resize_token_embeddings\(70\)"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")


@pytest.mark.parametrize("save", ["auto", True, False])
def test_embeddings_are_saved_where_they_were_resized_or_it_is_asked(base: str, save, tmp_path):
    for make, is_resized in ((resized, True), (AutoModelForCausalLM.from_pretrained, False)):
        model = get_peft_model(make(base), lora(base, target_modules=["attention"]))
        model.save_pretrained(tmp_path, save_embedding_layers=save)
        with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
            embeddings = [key for key in file.keys() if "lora_" not in key]  # noqa: SIM118 (not a dict)
        assert len(embeddings) == 2 * (save is True or (save == "auto" and is_resized)), (is_resized, embeddings)


def test_peft_reads_what_veneer_wrote(base: str, tmp_path):
    peft = pytest.importorskip("peft")
    model = perturb(get_peft_model(resized(base), lora(base, target_modules=["attention"])), "default", 3)
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(2)
    fresh = AutoModelForCausalLM.from_pretrained(base)
    fresh.resize_token_embeddings(fresh.config.vocab_size + NEW)
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)


def test_embeddings_too_are_those_of_the_given_state_dict(base: str, tmp_path):
    model = get_peft_model(resized(base), lora(base, target_modules=["attention"]))
    model.save_pretrained(tmp_path, state_dict={key: t * 0 + 1 for key, t in model.state_dict().items()})
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert all((file.get_tensor(key) == 1).all() for key in file.keys())  # noqa: SIM118 (not a dict)


def test_a_weight_that_is_no_embedding_is_not_taken_for_one(tmp_path):
    """Though its module has the name of one elsewhere: the base model is not changed by a file."""
    from safetensors.torch import load_file, save_file

    base = torch.nn.Sequential()
    base.shared, base.other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    get_peft_model(base, LoraConfig(r=2, target_modules=["other"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.shared.weight": torch.ones(4, 4)}, file)
    fresh = torch.nn.Sequential()
    fresh.shared, fresh.other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    with pytest.raises(CheckpointError, match="neither the adapter's nor an embedding of the model"):
        PeftModel.from_pretrained(fresh, tmp_path, check_base=False)
