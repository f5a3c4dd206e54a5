"""`save_pretrained(state_dict=...)` saves the values that it is given."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from veneer import CheckpointError, LoraConfig, get_peft_model

from . import models
from .cases import ONE_EACH, Case
from .models import perturb


@pytest.mark.parametrize("case", [case for case in ONE_EACH if not case.siblings and not case.needs_experts], ids=str)
def test_the_values_that_are_given_are_saved(case: Case, tmp_path):
    """Those of another moment of the same model (a moving average, say), which keeps its own."""
    model = case.build()
    model.save_pretrained(tmp_path / "one")
    given = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    perturb(model, "default", 8)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "two", state_dict=given)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def lora():
    return perturb(get_peft_model(models.build("llama"), LoraConfig(r=2, target_modules=["q_proj"])), "default", 3)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_keys_of_a_wrapped_model(prefix: str, tmp_path):
    model = lora()
    model.save_pretrained(tmp_path, state_dict={prefix + key: t * 0 + 1 for key, t in model.state_dict().items()})
    assert all((tensor == 1).all() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())


def test_keys_of_a_file(tmp_path):
    model = lora()
    model.save_pretrained(tmp_path / "one")
    given = {key: t * 2 for key, t in load_file(tmp_path / "one" / "adapter_model.safetensors").items()}
    model.save_pretrained(tmp_path / "two", state_dict=given)
    two = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert two.keys() == given.keys() and all(torch.equal(two[key], given[key]) for key in given)


def test_a_state_dict_without_the_adapter_is_refused(tmp_path):
    model = lora()
    for keys in ([], list(model.state_dict())[:1]):
        given = {"weight": torch.ones(1)} | {key: model.state_dict()[key] for key in keys}
        with pytest.raises(CheckpointError, match=r"state_dict lacks \d tensors of adapter 'default'"):
            model.save_pretrained(tmp_path, state_dict=given)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, state_dict={})  # as Trainer passes it where it has gathered nothing
