"""Methods that learn few entries, few biases or a mixture for each task, against their formulas derived in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from veneer import CheckpointError, ConfigError, PeftModel, get_peft_model

from . import models
from .models import output
from .test_numpy import adapt, agree, arr, places, sample, state


@places
def test_shira(place: str):
    """W with the learned values added at the file's rows and columns, one entry after the other."""
    layer, p, W, b = adapt(veneer.ShiraConfig, place, r=2, random_seed=3)
    rows, columns = layer.adapters["default"].shira_indices.numpy()
    assert len(rows) == 2 * sum(W.shape) == len(set(zip(rows, columns, strict=True)))
    for value, row, column in zip(p["shira_weight"], rows, columns, strict=True):
        W[row, column] += value
    agree(layer, W, b)


def test_shira_on_one_row_never_forms_the_matrix(monkeypatch):
    layer, *_ = adapt(veneer.ShiraConfig, "linear", r=2)
    x = sample(layer.base_layer)[:1, :1]
    dense = layer.base_layer(x) + x @ layer.adapters["default"].delta().T
    monkeypatch.setattr("veneer.methods.shira.scatter", None)
    torch.testing.assert_close(layer(x), dense)


def random_mask(module, r: int) -> torch.Tensor:
    """The last r (in + out) entries of the weight."""
    mask = torch.zeros(module.weight.numel())
    mask[-r * sum(module.weight.shape) :] = 1
    return mask.view_as(module.weight)


def test_shira_with_a_mask_of_its_own(tmp_path):
    """The mask comes back from the file, without the function."""
    config = veneer.ShiraConfig(r=2, mask_type="last", target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"set config\.mask_fn"):
        get_peft_model(models.build("llama"), config)
    config.mask_fn = random_mask
    model = models.perturb(get_peft_model(models.build("llama"), config).eval())
    layer = next(iter(state(model).layers.values()))
    delta = arr(layer.adapters["default"].delta()).flatten()
    assert (delta != 0).sum() == 200 and (delta[-200:] != 0).all()
    model.save_pretrained(tmp_path)
    batch = models.inputs("llama")
    loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path)
    assert torch.equal(output(loaded, batch), output(model, batch))
    config.mask_fn = lambda module, r: torch.ones_like(module.weight)
    with pytest.raises(ConfigError, match="with 2100 ones"):
        get_peft_model(models.build("llama"), config)


def test_shira_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"asks for 2200 entries, its weight has 2100"):
        get_peft_model(models.build("llama"), veneer.ShiraConfig(r=22, target_modules=["q_proj"]))
    model = get_peft_model(models.build("llama"), veneer.ShiraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(t for key, t in tensors.items() if key.endswith("shira_indices"))[0, 0] = 70
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="lie outside its weight"):
        PeftModel.from_pretrained(models.build("llama"), tmp_path)


def test_shira_draws_pefts_mask():
    """Seeded or not, so that training can go over from one library to the other by the config alone."""
    peft = pytest.importorskip("peft")
    for seed in (None, 5):
        settings = dict(r=3, target_modules=["q_proj"], random_seed=seed)
        ours = get_peft_model(models.build("llama"), veneer.ShiraConfig(**settings))
        theirs = peft.get_peft_model(models.build("llama"), peft.ShiraConfig(**settings))
        mine = state(ours).layers["model.layers.0.self_attn.q_proj"].adapters["default"].shira_indices
        layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
        assert np.array_equal(mine.numpy(), layer.shira_indices["default"].numpy())
