"""Low-rank and bias methods against their papers' formulas, derived again in NumPy with no code of veneer's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import veneer
from veneer import ops

from . import models
from .test_numpy import TOLERANCE, adapt, agree, arr, attach, base_of, linear_places, sample, state


@pytest.mark.parametrize("place", ["linear", "conv1d"])
def test_beft(place: str):
    """W x + b + b'."""
    layer, p, W, b = adapt(veneer.BeftConfig, place)
    x = sample(layer.base_layer)
    assert np.abs(p["beft_bias"]).max() > 0.1
    np.testing.assert_allclose(arr(layer(x)), arr(x) @ W.T + b + p["beft_bias"], **TOLERANCE)
    np.testing.assert_allclose(arr(layer.fold(layer.stack(("default",)))[1]), b + p["beft_bias"][0], **TOLERANCE)


def test_beft_without_a_bias_runs_and_says_that_it_cannot_merge():
    model = attach("llama", veneer.BeftConfig(target_modules=["down_proj"]))
    layer = state(model).layers["model.layers.0.mlp.down_proj"]
    x, (W, _) = sample(layer.base_layer), base_of(layer.base_layer)
    np.testing.assert_allclose(arr(layer(x)), arr(x) @ W.T + arr(layer.adapters["default"].beft_bias), **TOLERANCE)
    before = models.output(model, models.inputs("llama"))
    with pytest.raises(veneer.NotMergeable, match="has no bias"):
        model.merge_adapter()
    assert torch.equal(models.output(model, models.inputs("llama")), before)


@linear_places
def test_delora(place: str):
    """W + lambda / r sum_i (b_i / |b_i|) (a_i / |a_i|)^T diag(|W's columns|)."""
    layer, p, W, b = adapt(veneer.DeloraConfig, place, r=3, delora_lambda=2.5)
    lengths = np.sqrt((W**2).sum(0))
    update = sum(
        np.outer(column / np.sqrt(column @ column), row / np.sqrt(row @ row))
        for column, row in zip(p["delora_B"].T, p["delora_A"], strict=True)
    )
    assert np.sqrt((update**2).sum()) <= 3
    agree(layer, W + p["delora_lambda"][0] / 3 * update * lengths, b)


@pytest.mark.parametrize(
    ("config", "field"), [(veneer.LoraConfig, "lora_dropout"), (veneer.VeraConfig, "vera_dropout")]
)
def test_dropout_acts_on_the_input_of_the_update_in_training(config, field: str):
    layer, *_ = adapt(config, "linear", r=3, **{field: 0.5})
    x = sample(layer.base_layer)
    base, whole = layer.base_layer(x), layer(x)
    torch.manual_seed(0)
    with ops.plain("low_rank_linear"):  # the fast path draws other masks
        trained = layer.train()(x)
    torch.manual_seed(0)
    thinned = torch.nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(trained - base, layer.eval()(thinned) - layer.base_layer(thinned), rtol=1e-4, atol=1e-4)
    assert (trained - whole).abs().max() > 0.01
