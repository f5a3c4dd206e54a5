"""Methods that come from AdapterHub's library and pyreft, derived again in NumPy with no code of veneer's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import veneer
from veneer import ConfigError, TargetError, get_peft_model

from . import models
from .test_numpy import TOLERANCE, arr, attach, state, watching


def values(adapter) -> dict[str, np.ndarray]:
    return {name.removesuffix(".weight"): arr(p) for name, p in adapter.named_parameters()}


def orthonormal_rows(P: np.ndarray) -> np.ndarray:
    """Gram and Schmidt, one row after the other."""
    rows: list[np.ndarray] = []
    for row in P:
        row = row - sum((row @ q) * q for q in rows)
        rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


# ReFT


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("config", [veneer.LoReftConfig, veneer.NoReftConfig, veneer.DiReftConfig])
def test_reft(config, name: str):
    """h + R^T (W h + b - R h) at the first 2 and the last 1 tokens of each row, elsewhere h; DiReFT without R h."""
    model = attach(name, config(r=4, prefix_positions=2, suffix_positions=1))
    batch = models.inputs(name)
    batch["attention_mask"] = torch.tensor([[1] * 7, [0, 0] + [1] * 5, [1] * 6 + [0]])
    real = [range(7), range(2, 7), range(6)]
    layers = state(model).layers
    assert len(layers) == (3 if name == "t5" else 2) and not any("decoder.block" in path for path in layers)
    for layer in layers.values():
        parts = {"prefix": {}, "suffix": {}}
        for key, value in values(layer.adapters["default"]).items():
            parts[key.split(".")[0].removeprefix("reft_")][key.split(".", 1)[1]] = value
        with watching(layer.base_layer) as inner, watching(layer) as outer, torch.no_grad():
            model(**batch)
        y, expected = inner[0][1], inner[0][1].copy()
        for row, tokens in enumerate(real):
            for part, places in (("prefix", tokens[:2]), ("suffix", tokens[-1:])):
                p = parts[part]
                W, b, R = p["learned_source"], p["learned_source.bias"], p["projection"]
                R = orthonormal_rows(R) if config is veneer.LoReftConfig else R
                for place in places:
                    h = y[row, place]
                    inside = 0 if config is veneer.DiReftConfig else R @ h
                    expected[row, place] = h + R.T @ (W @ h + b - inside)
        assert np.abs(expected - y).max() > 0.1
        np.testing.assert_allclose(outer[0][1], expected, **TOLERANCE)


def edited(model, **call) -> list[list[int]]:
    """Which tokens of each row the first layer's edit changes."""
    layer = next(iter(state(model).layers.values()))
    with watching(layer.base_layer) as inner, watching(layer) as outer, torch.no_grad():
        model(**call)
    return [np.flatnonzero(row).tolist() for row in np.abs(outer[0][1] - inner[0][1]).max(-1) > 1e-6]


def test_refts_prompt_ends_where_the_answer_begins():
    model = attach("llama", veneer.LoReftConfig(r=2, prefix_positions=1, suffix_positions=2))
    ids = models.inputs("llama")["input_ids"]
    mask = torch.tensor([[1] * 7, [0, 0] + [1] * 5, [1] * 6 + [0]])
    labels = ids.masked_fill(mask == 0, -100)
    assert edited(model, input_ids=ids) == [[0, 5, 6]] * 3
    assert edited(model, input_ids=ids, attention_mask=mask, labels=labels) == [[0, 5, 6], [2, 5, 6], [0, 4, 5]]
    labels[:, :4] = -100
    assert edited(model, input_ids=ids, attention_mask=mask, labels=labels) == [[0, 2, 3], [2, 3], [0, 2, 3]]
    assert edited(model, input_ids=ids, attention_mask=mask, prompt_lengths=[1, 3, 5]) == [[0], [2, 3, 4], [0, 3, 4]]
    everywhere = attach("llama", veneer.LoReftConfig(r=2, prefix_positions="all"))
    assert edited(everywhere, input_ids=ids, attention_mask=mask) == [[*range(7)], [*range(2, 7)], [*range(6)]]


def test_labels_that_are_not_the_models_own_tokens_end_no_prompt():
    model = get_peft_model(
        models.bert("ForTokenClassification"), veneer.LoReftConfig(r=2, prefix_positions=3, task_type="TOKEN_CLS")
    )
    models.perturb(model.eval(), scale=0.3)
    ids, labels = models.inputs("bert")["input_ids"], torch.full((3, 7), -100)
    labels[:, 1:] = 1
    assert edited(model, input_ids=ids, labels=labels) == [[0, 1, 2]] * 3


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_reft_generates_with_padding_as_without(name: str):
    """Also behind a learned prompt, and for an encoder that `generate` calls past the model, with another batch."""
    model = attach(name, veneer.LoReftConfig(r=4, prefix_positions=2, suffix_positions=2))
    model.base_model.model.generation_config.eos_token_id = None
    ids = models.inputs(name)["input_ids"]
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], dim=1)
    scores = dict(do_sample=False, max_new_tokens=4, output_scores=True, return_dict_in_generate=True)
    model.generate(input_ids=ids[:2, :4], max_new_tokens=2)
    right = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **scores).scores
    if name == "t5":  # relative positions: padding on the right leaves them alone
        padded = torch.cat([ids, torch.zeros(3, 2, dtype=torch.long)], dim=1)
    found = model.generate(input_ids=padded, attention_mask=(padded > 0).long(), **scores).scores
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        base = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **scores).scores
    assert (base[0] - right[0]).abs().max() > 0.01


def test_reft_counts_from_behind_a_learned_prompt():
    model = attach("llama", veneer.LoReftConfig(r=2, prefix_positions=1, suffix_positions=1))
    model.add_adapter("prompt", veneer.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model.set_adapter(["default", "prompt"])
    assert edited(model, input_ids=models.inputs("llama")["input_ids"]) == [[3, 9]] * 3


def test_refts_fields():
    assert list(state(attach("llama", veneer.LoReftConfig(layers=[1]))).layers) == ["model.layers.1"]
    for wrong in (dict(layers="some"), dict(prefix_positions="last"), dict(prefix_positions=0), dict(r=0)):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            veneer.LoReftConfig(**wrong)
    with pytest.raises(TargetError, match="no target lies in layer 7"):
        attach("llama", veneer.LoReftConfig(layers=[7]))
    with pytest.raises(TargetError, match="orthonormal"):
        attach("llama", veneer.LoReftConfig(r=31))
