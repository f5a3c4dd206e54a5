"""Methods that learn from shared banks and random bases, derived again in NumPy with no code of veneer's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import veneer
from veneer import NotMergeable, get_peft_model

from . import models
from .models import output
from .test_numpy import agree, arr, sample
from .test_numpy_shared import PLACES, layers_of, models_of_both_kinds


@models_of_both_kinds
def test_pvera_in_the_mean(name: str):
    """W + diag(b) B diag(d) A with the first half of d and of A's rows."""
    r = 5
    for layer, p, shared, W, b in layers_of(name, veneer.PveraConfig(r=r, target_modules=PLACES[name]), scale=1.0):
        A, B = shared["pvera_A"][:, : W.shape[1]], shared["pvera_B"][: W.shape[0]]
        assert A.shape[0] == p["pvera_lambda_d"].size == 2 * r and B.shape[1] == r
        d = np.diag(p["pvera_lambda_d"][:r])
        agree(layer, W + np.diag(p["pvera_lambda_b"]) @ B @ d @ A[:r], b)


@models_of_both_kinds
def test_pvera_in_training(name: str):
    """diag(b) B (mu + exp(v / 2) e) over many draws: the mean is the eval output, the variance follows from v."""
    r = 3
    for layer, p, shared, W, _ in layers_of(name, veneer.PveraConfig(r=r, target_modules=PLACES[name])):
        x = sample(layer.base_layer)[:1, :1]
        A, B = shared["pvera_A"][:, : W.shape[1]], shared["pvera_B"][: W.shape[0]]
        v = (p["pvera_lambda_d"][:, None] * A @ arr(x)[0, 0])[r:]
        covariance = np.diag(p["pvera_lambda_b"]) @ B * np.exp(v) @ B.T @ np.diag(p["pvera_lambda_b"])
        with torch.no_grad():
            mean = arr(layer(x))[0, 0]
            draws = arr(layer.train()(x.expand(20000, 1, -1)))[:, 0]
        deviation = np.sqrt(np.diag(covariance))
        np.testing.assert_allclose(draws.mean(0), mean, atol=float(5 * deviation.max() / np.sqrt(20000)))
        np.testing.assert_allclose(draws.std(0), deviation, rtol=0.05)


def pvera(**settings):
    config = veneer.PveraConfig(r=5, target_modules=PLACES["llama"], **settings)
    return models.perturb(get_peft_model(models.build("llama"), config).eval(), scale=0.3)


def test_pvera_samples_in_training_or_when_asked():
    batch = models.inputs("llama")
    model = pvera()
    assert torch.equal(output(model, batch), output(model, batch))
    assert not torch.equal(output(model.train(), batch), output(model, batch))
    always = pvera(sample_at_inference=True)
    assert not torch.equal(output(always, batch), output(always, batch))
    with pytest.raises(NotMergeable, match="samples at inference"):
        always.merge_adapter()


def test_pveras_seed_repeats_its_draws():
    """The same calls in order give the same outputs; two calls, and two layers of one shape, do not."""
    batch, runs = models.inputs("llama"), []
    for _ in range(2):
        model = pvera(sample_at_inference=True, generator_seed=5)
        torch.manual_seed(len(runs))
        runs.append([output(model, batch) for _ in range(2)])
    assert all(map(torch.equal, *runs)) and not torch.equal(*runs[0])
    layers = model.get_base_model().model.layers
    one, two = (layer.self_attn.q_proj.adapters["default"] for layer in layers)
    assert not torch.equal(one.noise(torch.zeros(9)), two.noise(torch.zeros(9)))
    assert not torch.equal(one.noise(torch.zeros(9)), pvera(generator_seed=6).get_base_model().model.layers[
        0
    ].self_attn.q_proj.adapters["default"].noise(torch.zeros(9)))  # fmt: skip


def test_pveras_seeded_draws_are_the_same_in_a_recomputation():
    grads = []
    for checkpointing in (False, True):
        model = pvera(generator_seed=5).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses = [output(model, models.inputs("llama", seed=seed)).square().mean() for seed in (1, 2)]
        sum(losses).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)
