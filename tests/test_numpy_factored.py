"""Updates in structured factors, against their papers' formulas derived again in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import veneer
from veneer import ConfigError, TargetError, get_peft_model

from . import models
from .test_numpy import adapt, agree, arr, attach, places, state


def product(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """B A, of kernels flattened to matrices."""
    return B.reshape(len(B), -1) @ A.reshape(len(A), -1)


@places
def test_hira(place: str):
    """W0 * (1 + B A), entry by entry."""
    layer, p, W, b = adapt(veneer.HiraConfig, place, r=3)
    agree(layer, W * (1 + product(p["hira_A"], p["hira_B"])), b)


def test_hira_on_an_embedding():
    path = "transformer.wte"
    layer = state(attach("gpt2", veneer.HiraConfig(target_modules=["wte"], r=3))).layers[path]
    p = {name: arr(v) for name, v in layer.adapters["default"].named_parameters()}
    W = arr(layer.base_layer.weight) * (1 + (p["hira_embedding_B"] @ p["hira_embedding_A"]).T)
    ids = torch.tensor([[3, 0, 66], [11, 3, 5]])
    np.testing.assert_allclose(arr(layer(ids)), W[ids.numpy()], rtol=1e-5, atol=1e-6)


def test_hira_reads_the_pretrained_weight_under_a_merged_adapter():
    """Two merged one after the other make W0 (1 + B A + D C), not W0 (1 + B A) (1 + D C)."""
    model = attach("llama", veneer.HiraConfig(r=3, target_modules=["q_proj"]))
    model.add_adapter("two", veneer.HiraConfig(r=2, target_modules=["q_proj"]))
    models.perturb(model, "two", scale=0.3)
    model.set_adapter(["default", "two"])
    layer = state(model).layers["model.layers.0.self_attn.q_proj"]
    W = arr(layer.base_layer.weight)
    one, two = (product(arr(a.hira_A), arr(a.hira_B)) for a in layer.adapters.values())
    model.merge_adapter(["two"])
    model.merge_adapter(["default"])
    np.testing.assert_allclose(arr(layer.base_layer.weight), W * (1 + one + two), rtol=1e-5, atol=1e-6)


def test_hiras_rank_pattern():
    model = get_peft_model(models.build("llama"), veneer.HiraConfig(r=4, rank_pattern={"v_proj": 2}))
    ranks = {path: layer.adapters["default"].hira_A.shape[0] for path, layer in state(model).layers.items()}
    assert {r for path, r in ranks.items() if path.endswith("v_proj")} == {2}
    assert {r for path, r in ranks.items() if path.endswith("q_proj")} == {4}


def test_hiras_limits():
    with pytest.raises(TargetError, match="groups"):
        get_peft_model(models.build("grouped"), veneer.HiraConfig(target_modules=["conv"]))
    with pytest.raises(ConfigError, match="gaussian"):
        veneer.HiraConfig(init_weights="gauss")
