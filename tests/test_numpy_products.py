"""Methods whose update is a product of small matrices, against their papers' formulas derived again in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import veneer

from .test_numpy import PLACES, adapt, agree, places, sample


@places
def test_loha(place: str):
    """W + alpha / r (A1 B1) * (A2 B2), entry by entry."""
    layer, p, W, b = adapt(veneer.LoHaConfig, place, r=3, alpha=5)
    product = np.einsum("ok,ki,ol,li->oi", *(p[f"hada_w{i}_{j}"] for i in (1, 2) for j in "ab"))
    agree(layer, W + 5 / 3 * product, b)


def test_loha_with_a_core():
    """Proposition 3: each product is sum_ij T[i, j, kernel] A[i, out] B[j, channel]."""
    layer, p, W, b = adapt(veneer.LoHaConfig, "conv", r=3, alpha=50, use_effective_conv2d=True)
    one, two = (np.einsum("ijkl,io,jc->ockl", p[f"hada_t{i}"], p[f"hada_w{i}_a"], p[f"hada_w{i}_b"]) for i in (1, 2))
    agree(layer, W + 50 / 3 * (one * two).reshape(W.shape), b)


def test_lohas_gradients_with_a_core():
    """dL/dA1[i, o] = s sum_ckl G[o, c, k, l] (sum_j T1[i, j, k, l] B1[j, c]) P2[o, c, k, l]; A2 likewise."""
    layer, p, W, _ = adapt(veneer.LoHaConfig, "conv", r=3, alpha=50, use_effective_conv2d=True)
    adapter, G = layer.adapters["default"], np.random.default_rng(0).normal(size=W.shape)
    (adapter.delta() * torch.tensor(G)).sum().backward()
    for i, other in ((1, 2), (2, 1)):
        T, B = p[f"hada_t{i}"], p[f"hada_w{i}_b"]
        P = np.einsum("ijkl,io,jc->ockl", p[f"hada_t{other}"], p[f"hada_w{other}_a"], p[f"hada_w{other}_b"])
        expected = 50 / 3 * np.einsum("ockl,ijkl,jc,ockl->io", G.reshape(P.shape), T, B, P)
        np.testing.assert_allclose(getattr(adapter, f"hada_w{i}_a").grad.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_lohas_rank_goes_beyond_its_factors():
    """Up to r^2, which is what the product is for; and it starts at zero."""
    layer, p, W, _ = adapt(veneer.LoHaConfig, "linear", r=3)
    with torch.no_grad():
        assert np.linalg.matrix_rank(layer.adapters["default"].delta().numpy(), tol=1e-4) == 9
    assert not adapt(veneer.LoHaConfig, "linear", 0.0, r=3)[1]["hada_w2_b"].any()


@pytest.mark.parametrize("config", [veneer.LoHaConfig, veneer.LoKrConfig])
@pytest.mark.parametrize("place", ["linear", "conv"])
def test_dropout_leaves_out_rows_or_everything(config, place: str):
    """In training alone. LoHa makes up for the rows that went; LoKr when asked."""
    rows = dict(rank_dropout=0.5) | ({"rank_dropout_scale": True} if config is veneer.LoKrConfig else {})
    layer, *_ = adapt(config, place, r=3, **rows)
    whole, x = layer(sample(layer.base_layer)), sample(layer.base_layer)
    base = layer.base_layer(x)
    torch.manual_seed(0)
    change, full = (layer.train()(x) - base).transpose(0, 1 if place == "conv" else -1).flatten(1), whole - base
    full = full.transpose(0, 1 if place == "conv" else -1).flatten(1)
    gone = (change == 0).all(1)
    assert 0 < gone.sum() < len(gone)
    torch.testing.assert_close(change[~gone], full[~gone] * len(gone) / (~gone).sum(), rtol=1e-4, atol=1e-4)
    layer, *_ = adapt(config, place, r=3, module_dropout=0.5)
    layer.train()
    outs = [(layer(x) - base).abs().max() > 0 for _ in range(30)]
    assert 5 < sum(outs) < 25
    assert torch.equal(layer.eval()(x), layer(x)) and PLACES[place]
