"""Adapters on bare parameters: what names a module's own weight is that module, and nothing overrides another."""

from __future__ import annotations

import pytest
import torch

from veneer import LoraConfig, TargetError, get_peft_model

from . import models
from .models import output, perturb

TOLERANCE = dict(rtol=2e-4, atol=2e-5)
BATCH = models.inputs("llama")


def test_the_weight_of_a_linear_layer_is_that_layer():
    """As a bare parameter and as a module it is the same adapter; two of them add up, active and merged."""
    by_module = get_peft_model(models.build("llama"), LoraConfig(r=3, target_modules=["q_proj"]), "one").eval()
    perturb(by_module, "one", 3)
    by_module.add_adapter("two", LoraConfig(r=3, target_parameters=["q_proj.weight"]))
    perturb(by_module, "two", 4)
    other = get_peft_model(models.build("llama"), LoraConfig(r=3, target_modules=["q_proj"]), "one").eval()
    perturb(other, "one", 3)
    other.add_adapter("two", LoraConfig(r=3, target_modules=["q_proj"]))
    perturb(other, "two", 4)
    for model in (by_module, other):
        model.set_adapter(["one", "two"])
    expected = output(other, BATCH)
    torch.testing.assert_close(output(by_module, BATCH), expected, **TOLERANCE)
    by_module.merge_adapter()
    torch.testing.assert_close(output(by_module, BATCH), expected, **TOLERANCE)


def test_two_adapters_of_experts_add_up():
    """Active together in either order, merged together, and merged one after the other."""
    settings, batch = dict(r=3, target_parameters=["gate_up_proj"]), models.inputs("mixtral")
    model = get_peft_model(models.build("mixtral"), LoraConfig(**settings), "one").eval()
    model.add_adapter("two", LoraConfig(**settings))
    for seed, name in enumerate(("one", "two")):
        perturb(model, name, seed)
    found = []
    for names in (["one", "two"], ["two", "one"]):
        model.set_adapter(names)
        found.append(output(model, batch))
    model.set_adapter("one")
    assert not torch.allclose(output(model, batch), found[0], atol=1e-3)
    for steps in ([["one", "two"]], [["two"], ["one"]]):
        for names in steps:
            model.merge_adapter(names)
        found.append(output(model, batch))
        model.unmerge_adapter()
    with model.disable_adapter():
        base = output(model, batch)
    for out in found:
        assert not torch.allclose(out, base, atol=1e-3)
        torch.testing.assert_close(out, found[0], **TOLERANCE)


def test_dropout_works_where_the_parameter_is_a_linear_layers():
    settings = dict(r=3, target_parameters=["q_proj.weight"], lora_dropout=0.5)
    model = perturb(get_peft_model(models.build("llama"), LoraConfig(**settings))).train()
    assert not torch.equal(output(model, BATCH), output(model, BATCH))


def test_one_weight_is_not_adapted_twice_under_one_name():
    settings = dict(r=3, target_modules=["q_proj"], target_parameters=["q_proj.weight"])
    with pytest.raises(TargetError, match="already adapted by target_modules"):
        get_peft_model(models.build("llama"), LoraConfig(**settings))


@pytest.mark.parametrize(("model", "entry"), [("gpt2", "c_attn.weight"), ("llama", "embed_tokens.weight")])
def test_a_weight_stored_otherwise_is_named_by_its_module(model: str, entry: str):
    with pytest.raises(TargetError, match="put the module into target_modules"):
        get_peft_model(models.build(model), LoraConfig(r=3, target_parameters=[entry]))


def test_an_entry_that_matches_nothing_or_no_matrix_is_refused():
    with pytest.raises(TargetError, match="nearest"):
        get_peft_model(models.build("mixtral"), LoraConfig(r=3, target_parameters=["experts.gate_up_prj"]))
    with pytest.raises(TargetError, match="neither matrices nor stacks"):
        get_peft_model(models.build("mixtral"), LoraConfig(r=3, target_parameters=["norm.weight"]))


def test_dropout_and_variants_have_no_place_on_experts():
    for settings, word in ((dict(lora_dropout=0.1), "dropout"), (dict(use_dora=True), "DoRA")):
        with pytest.raises(TargetError, match=f"bare parameter, which does not support {word}"):
            get_peft_model(models.build("mixtral"), LoraConfig(r=3, target_parameters=["gate_up_proj"], **settings))
