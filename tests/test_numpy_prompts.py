"""Methods in front of the input or beside attention, derived again in NumPy from their papers with no code of ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import veneer

from . import models
from .test_numpy import arr, attach, relu, state

TOLERANCE = dict(rtol=1e-5, atol=2e-5)


def prompt(model):
    return state(model).prompts["default"]


def values(module) -> dict[str, np.ndarray]:
    return {name: arr(t) for name, t in [*module.named_parameters(), *module.named_buffers()]}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def spliced(name: str, p: np.ndarray, batch: dict) -> np.ndarray:
    """The base model's logits with embeddings put in front by hand; p is (n, width) or (batch, n, width)."""
    base = models.build(name)
    rows = base.get_input_embeddings()(batch["input_ids"])
    front = torch.tensor(p, dtype=rows.dtype).expand(len(rows), -1, -1)
    with torch.no_grad():
        return arr(base(inputs_embeds=torch.cat([front, rows], 1)).logits)


def lstm(x: np.ndarray, p: dict[str, np.ndarray], ending: str) -> np.ndarray:
    """One direction of an LSTM over (time, width), by its equations."""
    W, U, b = p[f"weight_ih_{ending}"], p[f"weight_hh_{ending}"], p[f"bias_ih_{ending}"] + p[f"bias_hh_{ending}"]
    h = c = np.zeros(U.shape[1])
    out = []
    for row in x[::-1] if ending.endswith("reverse") else x:
        i, f, g, o = np.split(W @ row + U @ h + b, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.array(out[::-1] if ending.endswith("reverse") else out)


def mlp(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    """Linear layers with ReLU between them."""
    numbers = sorted({int(name.split(".")[1]) for name in p if name.startswith("mlp_head")})
    for i in numbers:
        x = (x if i == 0 else relu(x)) @ p[f"mlp_head.{i}.weight"].T + p[f"mlp_head.{i}.bias"]
    return x


@pytest.mark.parametrize(("kind", "layers"), [("MLP", 2), ("LSTM", 1), ("LSTM", 2)])
def test_p_tuning(kind: str, layers: int, tmp_path):
    """The encoder's output in front of the input; the file holds just that."""
    config = veneer.PromptEncoderConfig(
        num_virtual_tokens=4,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=11,
        encoder_num_layers=layers,
        encoder_dropout=0.5 if layers > 1 else 0.0,
    )
    model, batch = attach("llama", config), models.inputs("llama")
    p = values(prompt(model))
    x = p["embedding.weight"]
    heads = {name.removeprefix("lstm_head."): v for name, v in p.items()}
    for layer in range(layers if kind == "LSTM" else 0):
        x = np.concatenate([lstm(x, heads, f"l{layer}"), lstm(x, heads, f"l{layer}_reverse")], -1)
    x = mlp(x, p)
    with torch.no_grad():
        np.testing.assert_allclose(arr(model(**batch).logits), spliced("llama", x, batch), **TOLERANCE)
    model.train().save_pretrained(tmp_path)
    assert model.training and prompt(model).training
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == {"prompt_embeddings"}
    np.testing.assert_allclose(tensors["prompt_embeddings"], x, **TOLERANCE)


def test_p_tuning_cannot_be_trained_on_from_a_file(tmp_path):
    attach("llama", veneer.PromptEncoderConfig(num_virtual_tokens=3)).save_pretrained(tmp_path)
    with pytest.raises(veneer.CheckpointError, match="is_trainable=False"):
        veneer.PeftModel.from_pretrained(models.build("llama"), tmp_path, is_trainable=True)


def test_p_tunings_encoder_is_checked():
    with pytest.raises(veneer.ConfigError, match="MLP or LSTM"):
        veneer.PromptEncoderConfig(num_virtual_tokens=3, encoder_reparameterization_type="GRU")
    with pytest.raises(veneer.ConfigError, match="encoder_dropout"):
        veneer.PromptEncoderConfig(num_virtual_tokens=3, encoder_dropout=1.0)
