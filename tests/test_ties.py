"""Adapters on tied weights: one set of numbers, and a file that says otherwise is refused before anything changes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer import CheckpointError, LoraConfig, PeftModel, TargetError, TrainableTokensConfig, get_peft_model

from . import models
from .models import output, perturb

BATCH = models.inputs("tied")
CONFIGS = {
    "lora": lambda: LoraConfig(r=3, target_modules=["embed_tokens"], ensure_weight_tying=True),
    "copy": lambda: LoraConfig(
        r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "tokens": lambda: TrainableTokensConfig(token_indices=[3, 5]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_loaded_adapter_trains_one_set_of_numbers(kind: str, tmp_path):
    perturb(get_peft_model(models.build("tied"), CONFIGS[kind]()).eval()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(models.build("tied"), tmp_path, is_trainable=True)
    learned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not [name for name in learned if "lm_head" in name]
    before = output(model, BATCH)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1) if p.requires_grad else None
    model.save_pretrained(tmp_path / "moved")
    again = PeftModel.from_pretrained(models.build("tied"), tmp_path / "moved")
    assert not torch.equal(output(model, BATCH), before)
    torch.testing.assert_close(output(again, BATCH), output(model, BATCH))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_with_other_numbers_for_the_twin_is_refused_and_nothing_changes(kind: str, tmp_path):
    model = perturb(get_peft_model(models.build("tied"), CONFIGS[kind]()).eval())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(k for k in tensors if "lm_head" in k and "base_layer" not in k)
    save_file(tensors | {key: tensors[key] + 1}, tmp_path / "adapter_model.safetensors")
    perturb(model, seed=5)
    before = output(model, BATCH)
    with pytest.raises(CheckpointError, match="lm_head"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(output(model, BATCH), before)
    with pytest.raises(CheckpointError, match="lm_head"):
        PeftModel.from_pretrained(models.build("tied"), tmp_path)


def test_both_sides_of_a_tie_are_not_named():
    config = LoraConfig(r=3, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    with pytest.raises(TargetError, match="share one weight"):
        get_peft_model(models.build("tied"), config)
