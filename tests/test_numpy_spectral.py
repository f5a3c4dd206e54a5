"""Methods built on spectra, subspaces and rotations, derived again in NumPy from their papers."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch

import veneer
from veneer import ConfigError
from veneer.maths import wavelet

from . import models
from .test_numpy import adapt, agree, arr, attach, base_of, block_diagonal, linear_places, places, run, sample, state


def circulants(kernels: np.ndarray) -> np.ndarray:
    """The matrix of a grid of kernels: each row of a block is the one above it, turned right by one place."""
    return np.block([[np.stack([np.roll(w, i) for i in range(len(w))]) for w in row] for row in kernels])


@pytest.mark.parametrize(("place", "b"), [("linear", 10), ("narrowing", 3), ("conv1d", 15)])
def test_c3a(place: str, b: int):
    layer, p, W, bias = adapt(veneer.C3AConfig, place, scale=3.0, block_size=b)
    agree(layer, W + circulants(p["c3a_kernel"]) / W.shape[1], bias)


@linear_places
def test_c3as_gradients(place: str):
    """dL/dx = G W'; dL/dw[p] = the sum of dL/dW' along the p-th turned diagonal, by in."""
    layer, p, W, _ = adapt(veneer.C3AConfig, place, scale=3.0, block_size=5)
    x = sample(layer.base_layer).requires_grad_()
    y = layer(x)
    G = np.random.default_rng(0).normal(size=y.shape)
    (y * torch.tensor(G)).sum().backward()
    whole = W + circulants(p["c3a_kernel"]) / W.shape[1]
    np.testing.assert_allclose(arr(x.grad), G @ whole, rtol=1e-4, atol=1e-4)
    dW = np.einsum("bto,bti->oi", G, arr(x)).reshape(len(W) // 5, 5, W.shape[1] // 5, 5)
    expected = np.stack([sum(dW[:, i, :, (i + turn) % 5] for i in range(5)) for turn in range(5)], -1) / W.shape[1]
    found = arr(layer.adapters["default"].c3a_kernel.grad)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_second_c3a_reads_the_layers_input():
    """Two together add up: W + C1 / in + C2 / in."""
    layer, p, W, b = adapt(veneer.C3AConfig, "linear", scale=3.0, block_size=5)
    again, q, *_ = adapt(veneer.C3AConfig, "linear", scale=3.0, block_size=10)
    layer.add("default", again.adapters["default"])
    agree(layer, W + (circulants(p["c3a_kernel"]) + circulants(q["c3a_kernel"])) / W.shape[1], b)


def test_c3as_blocks_divide_both_sides():
    with pytest.raises(ConfigError, match=r"block_size 7 .*in = 30; the divisors of 10 do"):
        attach("llama", veneer.C3AConfig(target_modules=["q_proj"], block_size=7))


def projector(P: np.ndarray, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Q and P' of DEFT: the subspace and what is read along it."""
    if method == "relu":
        return P, np.maximum(P, 0)
    return (np.linalg.qr(P)[0],) * 2


@linear_places
@pytest.mark.parametrize("method", ["relu", "qr"])
@pytest.mark.parametrize("para", [False, True])
def test_deft(place: str, method: str, para: bool):
    """(I - Q P'^T) W + alpha / r Q R; the bias is left alone."""
    settings = dict(r=4, alpha=7, decomposition_method=method, para=para)
    layer, p, W, b = adapt(veneer.DeftConfig, place, **settings)
    Q, right = projector(p["deft_P"], method)
    injected = 0 if para else 7 / 4 * Q @ p["deft_R"]
    agree(layer, (np.eye(len(W)) - Q @ right.T) @ W + injected, b)


def test_deft_alone_takes_its_subspace_away():
    """With qr and para, the outputs along Q are gone, whatever the input."""
    layer, p, W, b = adapt(veneer.DeftConfig, "linear", r=4, decomposition_method="qr", para=True)
    y = arr(layer(sample(layer.base_layer))) - b
    assert np.abs(y @ np.linalg.qr(p["deft_P"])[0]).max() < 1e-4 < np.abs(y).max()


def test_two_defts_compose():
    """The second takes its subspace from what the first has made."""
    layer, p, W, b = adapt(veneer.DeftConfig, "linear", r=4)
    again, q, *_ = adapt(veneer.DeftConfig, "linear", r=3)
    layer.add("default", again.adapters["default"])
    for each in (p, q):
        P, R = each["deft_P"], each["deft_R"]
        W = W - P @ np.maximum(P, 0).T @ W + P @ R
    agree(layer, W, b)


def test_deft_drops_from_what_is_put_in():
    """In training dropout falls on the input of R alone: what is taken away is taken in full."""
    layer, p, W, b = adapt(veneer.DeftConfig, "linear", r=4, deft_dropout=0.5)
    x = sample(layer.base_layer)
    layer.train()
    torch.manual_seed(0)
    kept = arr(torch.nn.functional.dropout(x, 0.5))
    torch.manual_seed(0)
    Q, right = projector(p["deft_P"], "relu")
    expected = run(layer.base_layer, arr(x), W - Q @ right.T @ W, b) + kept @ p["deft_R"].T @ Q.T
    np.testing.assert_allclose(arr(layer(x)), expected, rtol=1e-4, atol=1e-4)


def test_defts_rank_is_at_most_out():
    layer = state(attach("llama", veneer.DeftConfig(target_modules=["k_proj"], r=40, decomposition_method="qr"))).layers
    assert {tuple(a.adapters["default"].deft_P.shape) for a in layer.values()} == {(14, 14)}


def series(Q: np.ndarray, terms: int) -> np.ndarray:
    """I + 2 Q + ... + 2 Q^(terms - 2) + Q^(terms - 1)."""
    powers = [np.linalg.matrix_power(Q, k) for k in range(terms)]
    return powers[0] + 2 * sum(powers[1:-1]) + powers[-1]


def skewed(entries: np.ndarray, r: int) -> np.ndarray:
    Q = np.zeros((r, r))
    Q[np.triu_indices(r, 1)] = entries
    return Q - Q.T


def cayley(Q: np.ndarray) -> np.ndarray:
    eye = np.eye(len(Q))
    return (eye - Q) @ np.linalg.inv(eye + Q)


@linear_places
@pytest.mark.parametrize("init", ["psoft_init", "pissa_init"])
@pytest.mark.parametrize("how", ["exact", "series", "free"])
def test_psoft(place: str, init: str, how: str):
    """W + U S R V^T - U S V^T in the principal subspace, whatever alpha is."""
    r, eps = 6, 0.8
    settings = dict(use_cayley_neumann=how == "series", cayley_neumann_eps=eps, psoft_orth=how != "free")
    layer, p, W, b = adapt(veneer.PsoftConfig, place, r=r, psoft_alpha=5, ab_svd_init=init, **settings)
    w = p["psoft_R"]
    if how == "free":
        R = w
    else:
        Q = skewed(w, r)
        assert np.linalg.norm(Q) > eps
        R = series(Q * eps / np.linalg.norm(Q), 5) if how == "series" else cayley(-Q)
    R = p["psoft_R.vector_b"][:, None] * R * p["psoft_R.vector_a"]
    A, B = (arr(t) for t in layer.adapters["default"].buffers())
    U, S, Vh = (part[..., :r] if i < 2 else part[:r] for i, part in enumerate(np.linalg.svd(W, full_matrices=False)))
    np.testing.assert_allclose(B @ A, U * S @ Vh, atol=1e-5)
    for gram in (A @ A.T, B.T @ B):  # both orthogonal; where the singular values went
        assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-4
    np.testing.assert_allclose(np.diag(A @ A.T), np.ones(r) if init == "psoft_init" else S, rtol=1e-4)
    agree(layer, W + B @ (R - np.eye(r)) @ A, b)


def test_psoft_keeps_the_angles_of_the_principal_part():
    """A rotation without magnitudes leaves norms of, and angles between, the columns of the principal part."""
    off = dict(psoft_mag_a=False, psoft_mag_b=False)
    layer, p, W, _ = adapt(veneer.PsoftConfig, "narrowing", r=6, **off)
    A, B = (arr(t) for t in layer.adapters["default"].buffers())
    R = cayley(-skewed(p["psoft_R"], 6))
    np.testing.assert_allclose(R @ R.T, np.eye(6), atol=1e-9)
    part = W - B @ A + B @ R @ A
    with torch.no_grad():
        np.testing.assert_allclose(arr(layer.fold(layer.stack(("default",)))[0]), part, atol=1e-5)


def test_psofts_random_subspace_comes_back_with_its_seed(tmp_path):
    """A randomised SVD differs by its start; the file names the seed, and drawing leaves the global state alone."""
    config = dict(r=4, target_modules=["q_proj"], psoft_svd="lowrank", psoft_svd_lowrank_niter=1)
    model = attach("llama", veneer.PsoftConfig(**config, random_seed=3))
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    loaded = veneer.PeftModel.from_pretrained(models.build("llama"), tmp_path)
    batch = models.inputs("llama")
    assert torch.equal(models.output(loaded, batch), models.output(model, batch))
    other = attach("llama", veneer.PsoftConfig(**config, random_seed=4))
    assert not torch.allclose(models.output(other, batch), models.output(model, batch))


def test_psofts_subspace_fits_the_weight():
    with pytest.raises(ConfigError, match=r"r = 15 on .*k_proj' must be at most the smaller of \(30, 14\)"):
        attach("llama", veneer.PsoftConfig(target_modules=["k_proj"], r=15))


@places
def test_boft(place: str):
    """diag(s) W diag(R1, R2, ...)^T, R = (I - Q) (I + Q)^-1 of the skew part Q; the bias is not scaled."""
    layer, p, W, b = adapt(veneer.BOFTConfig, place, boft_block_size=3)
    R = block_diagonal([cayley((A - A.T) / 2) for A in p["boft_R"][0]])
    agree(layer, p["boft_s"].reshape(-1, 1) * (W @ R.T), b)


def dealt(D: int, H: int, i: int) -> np.ndarray:
    """The permutation P of the i-th factor: within 2^i blocks, half blocks 0, 2, 4, ... and then 1, 3, 5, ..."""
    half, rows = H // 2, []
    for start in range(0, D * H, H << i):
        for first in (0, 1):
            for piece in range(first, 2 << i, 2):
                rows += range(start + piece * half, start + (piece + 1) * half)
    return np.eye(D * H)[rows]


class Wide(torch.nn.Module):
    """A linear layer whose width allows for four butterfly factors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(48, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_boft_with_several_factors(n: int):
    """M_n ... M_1, M_i = P_i diag(R_i1, R_i2, ...) P_i^T, reaches 2^(n-1) blocks from every entry."""
    H, D = 6, 8
    config = veneer.BOFTConfig(target_modules=["linear"], boft_block_size=H, boft_n_butterfly_factor=n)
    torch.manual_seed(0)
    model = models.perturb(veneer.get_peft_model(Wide(), config).eval(), scale=0.3)
    layer = state(model).layers["linear"]
    R, s = arr(layer.adapters["default"].boft_R), arr(layer.adapters["default"].boft_s)
    M = np.eye(48)
    for i in range(n):
        P = dealt(D, H, i)
        M = P @ block_diagonal([cayley((A - A.T) / 2) for A in R[i]]) @ P.T @ M
    np.testing.assert_allclose(M @ M.T, np.eye(48), atol=1e-6)
    assert (np.abs(M) > 1e-12).sum(1).tolist() == [H << (n - 1)] * 48
    W, b = base_of(layer.base_layer)
    agree(layer, s * (W @ M.T), b)


def test_boft_needs_sizes_that_fit():
    for settings, message in (
        (dict(boft_block_size=7), r"boft_block_size 7 .*must divide its in = 48"),
        (dict(boft_block_size=0, boft_block_num=5), r"boft_block_num 5 .*must divide its in = 48"),
        (dict(boft_block_size=3, boft_n_butterfly_factor=2), r"blocks of even size .*multiple of 2, not 16 of 3"),
        (dict(boft_block_size=6, boft_n_butterfly_factor=5), r"multiple of 16, not 8 of 6"),
        (dict(boft_block_num=4), r"not boft_block_size = 4 and boft_block_num = 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            veneer.get_peft_model(Wide(), veneer.BOFTConfig(target_modules=["linear"], **settings))


def test_boft_drops_blocks_of_one_factor():
    """In training alone: a share p of the blocks of one factor is the identity."""
    settings = dict(boft_block_size=6, boft_n_butterfly_factor=3, boft_dropout=0.5)
    model = veneer.get_peft_model(Wide(), veneer.BOFTConfig(target_modules=["linear"], **settings))
    adapter = state(models.perturb(model)).layers["linear"].adapters["default"].train()
    seen = set()
    for _ in range(20):
        still = (adapter.rotations() == torch.eye(6)).all(-1).all(-1)
        assert still.sum() == 4 and still.any(1).sum() == 1
        seen.add(int(still.any(1).nonzero()))
    assert seen == {0, 1, 2}
    assert not (adapter.eval().rotations() == torch.eye(6)).all(-1).all(-1).any()


@pytest.mark.parametrize("name", wavelet.NAMES)
def test_wavelets_are_orthonormal_and_their_moments_vanish(name: str):
    """<h, h shifted by 2k> = 0, <h, g shifted by 2k> = 0; g is blind to polynomials of degree below the order."""
    low, high = (np.array(f) for f in wavelet.filters(name))
    order = int(re.sub(r"\D", "", name))
    for k in range(len(low) // 2):
        cut = len(low) - 2 * k
        np.testing.assert_allclose([low[:cut] @ low[2 * k :], high[:cut] @ high[2 * k :]], [k == 0] * 2, atol=1e-11)
        np.testing.assert_allclose([low[:cut] @ high[2 * k :], high[:cut] @ low[2 * k :]], [0, 0], atol=1e-11)
    n = np.arange(len(low)) / len(low)
    coiflet = name.startswith("coif")
    for p in range(2 * order if coiflet else order):
        assert abs(high @ n**p) < 1e-10
        assert not coiflet or abs(low @ (n - 2 * order / len(low)) ** p - np.sqrt(2) * (p == 0)) < 1e-10


def test_wavelets_with_closed_forms():
    three, seven = np.sqrt(3), np.sqrt(7)
    known = {
        "db1": np.array([1, 1]) / np.sqrt(2),
        "db2": np.array([1 + three, 3 + three, 3 - three, 1 - three]) / (4 * np.sqrt(2)),
        "coif1": np.array([1 - seven, 5 + seven, 14 + 2 * seven, 14 - 2 * seven, 1 - seven, seven - 3])
        / (16 * np.sqrt(2)),
    }
    for name, low in known.items():
        np.testing.assert_allclose(wavelet.filters(name)[0], low, atol=1e-12)
    for N in (4, 8, 10):  # the energy of a symlet is in the middle, that of a Daubechies wavelet at its start
        centre = [abs(np.arange(2 * N) @ np.square(wavelet.filters(f"{f}{N}")[0]) - N + 0.5) for f in ("sym", "db")]
        assert centre[0] < 1 < centre[1]


def synthesis(size: int, name: str) -> np.ndarray:
    """The 1-D inverse transform as a matrix: low then high columns, taps moved by two for each, borders cut."""
    low, high = (np.array(f) for f in wavelet.filters(name))
    L = len(low)
    N = size + L - 2 + size % 2
    G = np.zeros((N + L, N))
    for k in range(N // 2):
        G[2 * k : 2 * k + L, k], G[2 * k : 2 * k + L, N // 2 + k] = low, high
    return G[L - 2 : L - 2 + size]


@linear_places
@pytest.mark.parametrize("name", ["db1", "db4", "coif1"])
def test_waveft(place: str, name: str):
    """W + alpha sum c u v^T, u and v the waves at the places that the seed draws in a matrix of W's size."""
    n, seed = 50, 5
    settings = dict(n_frequency=n, scaling=3.0, random_loc_seed=seed, wavelet_family=name)
    layer, p, W, b = adapt(veneer.WaveFTConfig, place, **settings)
    U, V = synthesis(len(W), name), synthesis(W.shape[1], name)
    (rows, columns), (out, into) = (U.shape[1], V.shape[1]), W.shape
    dW = np.zeros_like(W)
    places = torch.randperm(W.size, generator=torch.Generator().manual_seed(seed))[:n]
    for c, at in zip(p["waveft_spectrum"], places, strict=True):
        i, j = int(at) // into + (rows - out) // 2, int(at) % into + (columns - into) // 2
        if i < rows // 2 and j >= columns // 2:  # the upper right quarter: high along the rows, low along the columns
            i, j = i + rows // 2, j - columns // 2
        elif i >= rows // 2 and j < columns // 2:
            i, j = i - rows // 2, j + columns // 2
        dW += 3.0 * c * np.outer(U[:, i], V[:, j])
    agree(layer, W + dW, b)


def test_waveft_without_the_transform_is_sparse():
    layer, p, W, b = adapt(veneer.WaveFTConfig, "linear", n_frequency=50, scaling=3.0, use_idwt=False)
    dW = np.zeros(W.size)
    dW[torch.randperm(W.size, generator=torch.Generator().manual_seed(777))[:50]] = 3.0 * p["waveft_spectrum"]
    agree(layer, W + dW.reshape(W.shape), b)


def test_waveft_in_proportion():
    """Larger targets get more: n (in x out) / mean (in x out), rounded, at least one; the sum stays about the same."""
    targets = ["q_proj", "k_proj", "down_proj"]
    config = veneer.WaveFTConfig(target_modules=targets, n_frequency=100, proportional_parameters=True)
    layers = state(attach("llama", config)).layers
    sizes = {path: layer.base_layer.weight.numel() for path, layer in layers.items()}
    mean = np.mean(list(sizes.values()))
    for path, size in sizes.items():
        assert layers[path].adapters["default"].waveft_spectrum.numel() == round(100 * size / mean)
    assert len({round(100 * size / mean) for size in sizes.values()}) == 3


@pytest.mark.parametrize("name", ["coif4", "coif5", "db11", "haar"])
def test_no_wavelet_no_waveft(name: str):
    with pytest.raises(ConfigError, match=f"wavelet_family '{name}': use one of db1, .* coif3"):
        veneer.WaveFTConfig(wavelet_family=name)
    with pytest.raises(ConfigError, match=r"between 1 and in x out = 420, not 421"):
        attach("llama", veneer.WaveFTConfig(target_modules=["k_proj"], n_frequency=421))


def split(W: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular directions that OSF keeps, U and V as columns, and the part of W beyond them."""
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    return U[:, :k], Vh[:k].T, U[:, k:] * S[k:] @ Vh[k:]


@linear_places
@pytest.mark.parametrize(("rank", "k"), [(9, 9), (0.3, 9), (None, 15)])
def test_osf(place: str, rank, k: int):
    """U_k S_k V_k^T + U S V^T, the second trained."""
    layer, p, W, b = adapt(veneer.OSFConfig, place, effective_rank=rank)
    U, S, V = (p[f"osf_svd_params.{name}_low"] for name in "USV")
    assert len(S) == 30 - k
    agree(layer, W - split(W, k)[2] + U * S @ V, b)


@linear_places
def test_osfs_gradients_are_orthogonal_to_what_it_keeps(place: str):
    """dL/dU = (I - Uk Uk^T) G V S, dL/dV = S U^T G (I - Vk Vk^T), dL/dS the diagonal of U^T G V."""
    layer, p, W, _ = adapt(veneer.OSFConfig, place, effective_rank=9)
    adapter, G = layer.adapters["default"], np.random.default_rng(0).normal(size=W.shape)
    (adapter.delta() * torch.tensor(G)).sum().backward()
    (U, S, V), (Uk, Vk, _) = (p[f"osf_svd_params.{name}_low"] for name in "USV"), split(W, 9)
    dU, dV = G @ V.T * S, (U * S).T @ G
    found = {name: arr(adapter.osf_svd_params[f"{name}_low"].grad) for name in "USV"}
    close = dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["U"], dU - Uk @ (Uk.T @ dU), **close)
    np.testing.assert_allclose(found["V"], dV - (dV @ Vk) @ Vk.T, **close)
    np.testing.assert_allclose(found["S"], np.diag(U.T @ G @ V.T), **close)
    assert np.abs(Uk.T @ dU).max() > 0.1 < np.abs(dV @ Vk).max()


def test_osf_keeps_what_the_principal_directions_do():
    """Trained by plain gradient steps, W' does to the kept directions what W did, on both sides."""
    model = veneer.get_peft_model(models.build("llama"), veneer.OSFConfig(target_modules=["q_proj"], effective_rank=9))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = models.inputs("llama")
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    for layer in state(model).layers.values():
        W, (Uk, Vk, _) = base_of(layer.base_layer)[0], split(base_of(layer.base_layer)[0], 9)
        with torch.no_grad():
            trained = arr(layer.fold(layer.stack(("default",)))[0])
        assert np.abs(trained - W).max() > 1e-3
        np.testing.assert_allclose(trained @ Vk, W @ Vk, atol=1e-5)
        np.testing.assert_allclose(Uk.T @ trained, Uk.T @ W, atol=1e-5)


def test_osfs_gradients_survive_a_copy():
    """The guard is part of the formula, not a hook on a Parameter that a copy or a load would lose."""
    model = attach("llama", veneer.OSFConfig(target_modules=["q_proj"], effective_rank=9))
    twin = copy.deepcopy(model)
    for each in (model, twin):
        models.output(each, models.inputs("llama")).square().mean().backward()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.grad is None and two.grad is None or torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("rank", [0, 14, 1.0])
def test_osf_keeps_some_and_trains_some(rank):
    with pytest.raises(ConfigError, match=rf"effective_rank {rank} on .* of its 14 directions; keep at least 1"):
        attach("llama", veneer.OSFConfig(target_modules=["k_proj"], effective_rank=rank))
