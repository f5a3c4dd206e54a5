"""A model of repeated layers: each with an adapter of its own over shared weights; and the old model back."""

from __future__ import annotations

import pytest
import torch

from veneer import ConfigError, LoraConfig, PeftModel, TargetError, get_peft_model

from . import models
from .models import output, perturb
from .test_parity import both_ways, peft

SETTINGS = dict(r=3, target_modules=["q_proj", "down_proj"], layer_replication=[[0, 2], [1, 2]], task_type="CAUSAL_LM")
BATCH = models.inputs("llama")


def adapted():
    return perturb(get_peft_model(models.build("llama"), LoraConfig(**SETTINGS)).eval())


def by_hand(model) -> torch.Tensor:
    """Layers 0, 1, 1 of the base, the second time with the third layer's adapters merged."""
    plain = models.llama(num_hidden_layers=3).eval()
    plain.load_state_dict(model.merge_and_unload().state_dict())
    return output(plain, BATCH)


def test_repeated_layers_share_weights_and_have_adapters_of_their_own():
    model = adapted()
    layers = model.get_base_model().model.layers
    assert len(layers) == 3 and model.get_base_model().config.num_hidden_layers == 3
    assert layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    assert layers[1].mlp.down_proj.lora_A.default.weight is not layers[2].mlp.down_proj.lora_A.default.weight
    expected = output(model, BATCH)
    torch.testing.assert_close(by_hand(model), expected, rtol=2e-4, atol=2e-5)


def test_it_generates_with_a_cache():
    model = adapted()
    with_cache = model.generate(**BATCH, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**BATCH, max_new_tokens=4, do_sample=False, use_cache=False), with_cache)


def test_unload_gives_the_old_model_back():
    base = models.build("llama")
    expected = output(base, BATCH)
    model = get_peft_model(base, LoraConfig(**SETTINGS))
    assert not torch.equal(output(model, BATCH), expected)
    bare = model.unload()
    assert len(bare.model.layers) == bare.config.num_hidden_layers == 2
    assert torch.equal(output(bare, BATCH), expected)


def test_it_saves_and_loads(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(models.build("llama"), tmp_path)
    assert torch.equal(output(again, BATCH), output(model, BATCH))


@pytest.mark.filterwarnings("ignore")
def test_pefts_files_agree(tmp_path):
    config = LoraConfig(**SETTINGS)
    both_ways(lambda: models.build("llama"), config, peft.LoraConfig(**SETTINGS), BATCH, tmp_path)


@pytest.mark.parametrize("ranges", [[[0, 3]], [[1, 1]], [[-1, 1]], [[0]]], ids=str)
def test_a_range_outside_the_layers_is_refused(ranges):
    base = models.build("llama")
    with pytest.raises(ConfigError, match="no range of the 2 layers"):
        get_peft_model(base, LoraConfig(**SETTINGS | dict(layer_replication=ranges)))
    assert len(base.model.layers) == 2


def test_a_failure_leaves_the_model_as_it_was():
    base = models.build("llama")
    with pytest.raises(TargetError):
        get_peft_model(base, LoraConfig(**SETTINGS | dict(target_modules=["q_projj"])))
    assert len(base.model.layers) == base.config.num_hidden_layers == 2


def test_a_model_with_adapters_is_not_replicated():
    model = get_peft_model(models.build("llama"), LoraConfig(r=2), "one")
    with pytest.raises(TargetError, match="unload them first"):
        model.add_adapter("two", LoraConfig(**SETTINGS))
    assert list(model.peft_config) == ["one"]
