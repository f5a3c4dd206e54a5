"""Methods whose layers share parts, derived again in NumPy from their papers with no code of veneer's."""

from __future__ import annotations

import numpy as np
import pytest

import veneer

from .test_numpy import agree, arr, attach, base_of, state

PLACES = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
models_of_both_kinds = pytest.mark.parametrize("name", PLACES)


def layers_of(name: str, config, scale: float = 0.3):
    """(layer, parameters and buffers by name, W (out, in), b) of each layer, and the shared part's arrays."""
    found = state(attach(name, config, scale))
    shared = {
        n: arr(t) for n, t in [*found.shared["default"].named_parameters(), *found.shared["default"].named_buffers()]
    }
    for layer in found.layers.values():
        adapter = layer.adapters["default"]
        values = {n: t.detach().numpy().astype(t.numpy().dtype if not t.is_floating_point() else float)
                  for n, t in [*adapter.named_parameters(), *adapter.named_buffers()]}  # fmt: skip
        yield layer, values, shared, *base_of(layer.base_layer)


@models_of_both_kinds
@pytest.mark.parametrize("sparse", [{}, {"sparse": True}, {"very_sparse": True}], ids=str)
def test_randlora(name: str, sparse: dict):
    """W + alpha / r sum of rank-one pieces: a random column of B times a row l_ij g_j A_i; all n r pairs once."""
    r, shapes = 4, set()
    config = veneer.RandLoraConfig(r=r, randlora_alpha=6, target_modules=PLACES[name], **sparse)
    for layer, p, shared, W, b in layers_of(name, config):
        small, large = min(W.shape), max(W.shape)
        n = -(-small // r)
        assert p["randlora_lambda"].shape == (r, n) and p["randlora_gamma"].shape == (n, small)
        A, B = shared["randlora_A"][:, 0, :small], shared["randlora_B"][:large]
        update = np.zeros((large, small))
        for k in range(n * r):
            (j, i), (row, basis) = divmod(k, r), divmod(k, n)
            scaled = p["randlora_lambda"][row, basis] * p["randlora_gamma"][basis] * A[row]
            update += 6 / r * np.outer(B[:, j, i], scaled)
        agree(layer, W + (update if W.shape == update.shape else update.T), b)
        assert sparse or np.linalg.matrix_rank(update) == small, "dense bases reach full rank"
        shapes.add(W.shape[0] > W.shape[1])
    assert shapes == {True, False}


def test_randloras_bases():
    """Standard deviation one; sparse ones hold three values, two thirds of them zero."""
    for settings in ({}, {"sparse": True}):
        config = veneer.RandLoraConfig(r=8, target_modules=PLACES["llama"], **settings)
        for X in state(attach("llama", config)).shared["default"].buffers():
            assert abs(X.std() - 1) < 0.02
            if settings:
                assert X.unique().numel() == 3 and abs((X == 0).float().mean() - 2 / 3) < 0.05
