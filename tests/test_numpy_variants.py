"""LoRA's variants: each against its paper's formula, derived again in NumPy, and all pairs of them together."""

from __future__ import annotations

import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch

import veneer
from veneer import ConfigError, LoraConfig, NotMergeable, PeftModel, TargetError, VeneerError, get_peft_model
from veneer.core.config import Config

from . import models
from .cases import experts
from .models import output, perturb
from .test_numpy import adapt, agree, arr, linear_places, places, sample, softmax

TOLERANCE = dict(rtol=2e-4, atol=2e-5)


def state(model):
    return models.state(model)


# A bias


@pytest.mark.parametrize("place", ["linear", "conv1d"])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_bias(place: str, rslora: bool):
    """b + s c beside W + s B A."""
    layer, p, W, b = adapt(veneer.BiasedLoraConfig, place, r=4, lora_alpha=6, use_rslora=rslora)
    s = 6 / (2 if rslora else 4)
    agree(layer, W + s * p["lora_B"] @ p["lora_A"], b + s * p["lora_B.bias"])


def test_lora_bias_with_dora():
    """The bias stays outside the magnitudes."""
    layer, p, W, b = adapt(veneer.BiasedLoraConfig, "linear", r=4, lora_alpha=6, use_dora=True)
    moved = W + 1.5 * p["lora_B"] @ p["lora_A"]
    moved *= (p["lora_magnitude_vector"] / np.linalg.norm(moved, axis=1))[:, None]
    agree(layer, moved, b + 1.5 * p["lora_B.bias"])


def test_a_bias_that_no_target_could_take_up_stays_unmerged():
    layer, p, W, _ = adapt(veneer.BiasedLoraConfig, "narrowing", r=4)
    x = sample(layer.base_layer)
    expected = arr(x) @ (W + 2 * p["lora_B"] @ p["lora_A"]).T + 2 * p["lora_B.bias"]
    np.testing.assert_allclose(arr(layer(x)), expected, rtol=1e-5, atol=2e-5)
    with pytest.raises(NotMergeable, match="no bias"):
        layer.fold(layer.stack(("default",)))


# QA-LoRA


@linear_places
def test_qalora(place: str):
    """Each group of 5 inputs is read as its mean times the number of groups."""
    layer, p, W, b = adapt(veneer.QALoraConfig, place, r=4, qalora_group_size=5)
    n = W.shape[1] // 5
    P = np.stack([np.where(np.arange(W.shape[1]) // 5 == g, n / 5, 0.0) for g in range(n)])
    assert p["lora_A"].shape == (4, n)
    agree(layer, W + 2 * p["lora_B"] @ p["lora_A"] @ P, b)


def test_a_group_that_does_not_divide_the_inputs_is_refused():
    with pytest.raises(TargetError, match="qalora_group_size 4 does not divide the 30"):
        adapt(veneer.QALoraConfig, "linear", r=4, qalora_group_size=4)
    with pytest.raises(ConfigError, match="qalora_group_size"):
        veneer.QALoraConfig(qalora_group_size=0)


# BD-LoRA


def diagonal(blocks) -> np.ndarray:
    """Blocks of one size on the diagonal."""
    h, w = blocks[0].shape
    whole = np.zeros((h * len(blocks), w * len(blocks)))
    for i, block in enumerate(blocks):
        whole[i * h : (i + 1) * h, i * w : (i + 1) * w] = block
    return whole


@pytest.mark.parametrize("side", "AB")
def test_bdlora(side: str):
    layer, p, W, b = adapt(
        veneer.BlockDiagonalLoraConfig,
        "linear",
        r=10,
        lora_alpha=5,
        use_bdlora={f"target_modules_bd_{side.lower()}": ["q_proj"], "nblocks": 5},
    )
    A, B = p["lora_A"], p["lora_B"]
    assert (A.shape, B.shape) == (((10, 6), (70, 10)) if side == "A" else ((10, 30), (70, 2)))
    A, B = (diagonal(np.split(A, 5)), B) if side == "A" else (A, diagonal(np.split(B, 5)))
    agree(layer, W + 0.5 * B @ A, b)


def test_what_bdlora_cannot_place_is_refused():
    q_proj = ["q_proj"]
    for settings, said in (
        (dict(nblocks=2), "named by neither"),
        (dict(target_modules_bd_a=["q_proj"], target_modules_bd_b=["self_attn"]), "named by both"),
        (dict(target_modules_bd_a=q_proj, nblocks=4), "nblocks 4 does not divide 30"),
        (dict(target_modules_bd_b=q_proj, nblocks=7), "nblocks 7 does not divide 10"),
    ):
        with pytest.raises(TargetError, match=said):
            adapt(veneer.BlockDiagonalLoraConfig, "linear", r=10, use_bdlora=settings)
    with pytest.raises(ConfigError, match="both name q_proj"):
        veneer.BdLoraConfig(target_modules_bd_a=q_proj, target_modules_bd_b=q_proj)
    layer, p, W, b = adapt(veneer.BlockDiagonalLoraConfig, "linear", r=4, use_bdlora=dict(match_strict=False))
    agree(layer, W + 2 * p["lora_B"] @ p["lora_A"], b)


# VeLoRA


def trained(layer, x):
    """Gradients of a sum of squares of a layer's output: (A, B, input, output)."""
    x = x.clone().requires_grad_()
    y = layer.train()(x)
    y.square().sum().backward()
    adapter = layer.adapters["default"]
    return arr(adapter.lora_A.weight.grad), arr(adapter.lora_B.weight.grad), arr(x.grad), arr(y)


@pytest.mark.parametrize("groups", [4, 10, 64])
@pytest.mark.parametrize("kind", ["batch_average", "batch_average_once", "random"])
def test_velora(kind: str, groups: int):
    """A's gradient is that of the inputs' projections on v, group by group; all others are exact."""
    settings = dict(num_groups=groups, scale=1.7, init_type=kind)
    layer, p, W, b = adapt(veneer.VeloraLoraConfig, "linear", r=4, velora_config=settings)
    A, B = p["lora_A"], p["lora_B"]
    agree(layer, W + 2 * B @ A, b)
    x = sample(layer.base_layer)
    grad_A, grad_B, grad_x, y = trained(layer, x)
    flat, g = arr(x).reshape(-1, 30), 2 * y.reshape(-1, 70)
    width = math.ceil(30 / groups)
    parts = np.pad(flat, ((0, 0), (0, groups * width - 30))).reshape(len(flat), groups, width)
    v = parts.mean((0, 1))
    v = arr(layer.adapters["default"].lora_velora_embed) if kind == "random" else v / np.linalg.norm(v)
    assert np.isclose(np.linalg.norm(v), 1, atol=1e-6)
    seen = 1.7 * ((parts @ v)[..., None] * v).reshape(len(flat), -1)[:, :30]
    np.testing.assert_allclose(grad_A, (2 * g @ B).T @ seen, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(grad_B, (2 * g).T @ (flat @ A.T), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(grad_x.reshape(-1, 30), g @ (W + 2 * B @ A), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(arr(layer.adapters["default"].lora_velora_embed), v, rtol=1e-4, atol=1e-6)


def test_velora_keeps_one_direction_or_takes_a_new_one():
    for kind, changes in (("batch_average", True), ("batch_average_once", False), ("random", False)):
        layer, *_ = adapt(veneer.VeloraLoraConfig, "linear", velora_config=dict(num_groups=4, init_type=kind))
        x, adapter = sample(layer.base_layer), layer.adapters["default"]
        layer.train()(x)
        first = adapter.lora_velora_embed.clone()
        layer(x[:1] * 3 + 1)
        assert torch.equal(adapter.lora_velora_embed, first) != changes
        layer.eval()(x)
        with torch.no_grad():
            layer.train()(x[:2])
        assert torch.equal(adapter.lora_velora_embed, first) != changes, "only a pass that is to learn looks at it"


def test_veloras_direction_outlives_a_file(tmp_path):
    config = veneer.VeloraLoraConfig(
        target_modules=["q_proj"], velora_config=dict(num_groups=4, init_type="batch_average_once")
    )
    model, batch = get_peft_model(models.build("llama"), config).train(), models.inputs("llama")
    output(model, batch)
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(models.build("llama"), tmp_path, is_trainable=True).train()
    key = "base_model.model.model.layers.1.self_attn.q_proj.adapters.default.lora_velora_embed"
    before = dict(other.named_buffers())[key].clone()
    assert before.any()
    output(other, models.inputs("llama", seed=8))
    assert torch.equal(dict(other.named_buffers())[key], before)


def test_velora_learns_under_autocast():
    layer, *_ = adapt(veneer.VeloraLoraConfig, "linear", r=4, velora_config=dict(num_groups=4))
    x = sample(layer.base_layer)
    exact = trained(layer, x)
    for p in layer.parameters():
        p.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        rough = trained(layer, x)
    for one, two in zip(exact, rough, strict=True):
        assert np.abs(one - two).max() < 0.1 * np.abs(one).max()


def test_velora_does_not_keep_its_input():
    kept = []
    layer, *_ = adapt(veneer.VeloraLoraConfig, "linear", velora_config=dict(num_groups=4))
    x = sample(layer.base_layer).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer.train()(x)
    assert kept and not any(t.numel() == x.numel() for t in kept)


# KaSA


def truncated(W: np.ndarray, r: int) -> np.ndarray:
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return (U[:, :-r] * S[:-r]) @ Vt[:-r]


@linear_places
def test_kasa(place: str):
    layer, p, W, b = adapt(veneer.KasaLoraConfig, place, r=4, lora_alpha=6)
    agree(layer, truncated(W, 4) + 1.5 * p["lora_B"] @ np.diag(p["lora_diag"]) @ p["lora_A"], b)


def test_kasa_with_dora():
    layer, p, W, b = adapt(veneer.KasaLoraConfig, "linear", r=4, use_dora=True)
    moved = truncated(W, 4) + 2 * p["lora_B"] @ np.diag(p["lora_diag"]) @ p["lora_A"]
    agree(layer, moved * (p["lora_magnitude_vector"] / np.linalg.norm(moved, axis=1))[:, None], b)


def test_kasa_starts_at_the_truncated_weight_and_leaves_the_base_whole():
    layer, _, W, b = adapt(veneer.KasaLoraConfig, "linear", scale=0.0, r=9)
    agree(layer, truncated(W, 9), b)
    with pytest.raises(TargetError, match="leaves none"):
        adapt(veneer.KasaLoraConfig, "linear", r=30)


def test_kasas_dropout_falls_on_what_is_learned():
    """With all of it dropped the layer is the truncated weight, not the whole one."""
    layer, _, W, b = adapt(veneer.KasaLoraConfig, "linear", r=4, lora_dropout=0.999999)
    x = sample(layer.base_layer)
    np.testing.assert_allclose(arr(layer.train()(x)), arr(x) @ truncated(W, 4).T + b, rtol=1e-4, atol=1e-4)


def test_kasas_loss():
    """beta |e|^2 + gamma (|B^T B - I| + |A A^T - I|), summed over the targets, on top of the model's."""
    batch = models.inputs("llama")
    losses = []
    for weights in ({}, dict(beta=0.3, gamma=0.02), dict(beta=0.0, gamma=0.0)):
        config = veneer.KasaLoraConfig(r=3, target_modules=["q_proj", "down_proj"], kasa_config=weights)
        model = perturb(get_peft_model(models.build("llama"), config))
        losses.append(model(**batch, labels=batch["input_ids"]).loss.item())
    e2 = distance = 0.0
    for adapter in state(model).adapters("default").values():
        A, B, e = arr(adapter.lora_A.weight), arr(adapter.lora_B.weight), arr(adapter.lora_diag)
        e2 += (e**2).sum()
        distance += np.linalg.norm(B.T @ B - np.eye(3)) + np.linalg.norm(A @ A.T - np.eye(3))
    assert np.isclose(losses[0] - losses[2], 1e-4 * e2 + 1e-3 * distance, atol=1e-5)
    assert np.isclose(losses[1] - losses[2], 0.3 * e2 + 0.02 * distance, rtol=1e-4)


# MonteCLoRA


def sampler_of(**settings):
    layer, p, W, b = adapt(veneer.MontecloraLoraConfig, "linear", r=3, monteclora_config=settings)
    return layer, p, W, b, layer.adapters["default"].lora_monteclora_sampler


@linear_places
def test_monteclora_is_lora_once_trained(place: str):
    layer, p, W, b = adapt(veneer.MontecloraLoraConfig, place, r=3, lora_alpha=6, monteclora_config={})
    agree(layer, W + 2 * p["lora_B"] @ p["lora_A"], b)


def test_monteclora_samples_in_training():
    """The layer's output is that of A + noise, where the noise is what the sampler drew; the merged weight has none."""
    layer, p, W, b, sampler = sampler_of(sample_scaler=0.5)
    x, drawn = sample(layer.base_layer), []
    sampler.register_forward_hook(lambda module, args, out: drawn.append(arr(out)))
    y = layer.train()(x)
    A = p["lora_A"] + drawn[0]
    assert np.abs(drawn[0]).max() > 0.1
    np.testing.assert_allclose(arr(y), arr(x) @ (W + 8 / 3 * p["lora_B"] @ A).T + b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        folded = layer.fold(layer.stack(("default",)))[0]
    np.testing.assert_allclose(arr(folded), W + 8 / 3 * p["lora_B"] @ p["lora_A"], rtol=1e-4, atol=1e-4)
    assert not torch.equal(layer(x), y) and len(drawn) == 2


def test_montecloras_distribution():
    """Against the paper's own procedure: N Gaussians of one Wishart covariance, mixed by log-normal weights."""
    n, r, count = 5, 3, 20000
    *_, sampler = sampler_of(num_samples=n, sample_scaler=0.7)
    sigma, a = arr(sampler.std_prior), np.exp(arr(sampler.expert_weights_prior))
    with torch.no_grad():
        ours = np.stack([arr(sampler(torch.zeros(r, 2))) for _ in range(count)])
    rng = np.random.default_rng(0)
    G = rng.normal(size=(count, r, r))
    D = np.maximum(np.exp(2 * sigma) * np.einsum("kij,kij->ki", G, G), 1e-3)
    spread = (1 - 2 / n) / a + (1 / a).sum() / n**2
    w = softmax(np.log(a) - np.log(a).mean() + np.sqrt(spread) * rng.normal(size=(count, n)))
    Z = rng.normal(size=(count, n, r, 2)) * np.sqrt(D)[:, None, :, None]
    theirs = 0.7 * np.einsum("kn,knij->kij", w, Z)
    assert np.abs(ours.mean(0)).max() < 0.05
    for power in (2, 4):
        np.testing.assert_allclose((ours**power).mean(0).mean(1), (theirs**power).mean(0).mean(1), rtol=0.12)
    np.testing.assert_allclose(arr(sampler.expert_weights).sum(), 1, rtol=1e-5)


def test_montecloras_divergences():
    """By integration: the mean of log q - log p under q."""
    *_, sampler = sampler_of(num_samples=4, dirichlet_prior=0.6, kl_loss_weight=1.0)
    sampler(torch.zeros(3, 2))
    learned = sampler.expert_weights_prior.exp(), sampler.std_prior, sampler.variance()
    a, sigma, D = (t.detach().double() for t in learned)
    torch.manual_seed(0)
    q, p = torch.distributions.Dirichlet(a), torch.distributions.Dirichlet(torch.full_like(a, 0.6))
    draws = q.sample((200000,)).clamp_min(1e-12)
    dirichlet = float((q.log_prob(draws) - p.log_prob(draws)).mean())
    one, df = torch.eye(3, dtype=torch.double), torch.tensor(3.0, dtype=torch.double)
    wq, wp = (torch.distributions.Wishart(df, covariance_matrix=c) for c in ((2 * sigma).exp().diag(), one))
    draws = wq.sample((200000,))
    wishart = float((wq.log_prob(draws) - wp.log_prob(draws)).mean())
    zero = torch.zeros(3, dtype=torch.double)
    gauss = torch.distributions.MultivariateNormal
    normal = float(torch.distributions.kl_divergence(gauss(zero, torch.diag(D)), gauss(zero, one)))
    assert np.isclose(float(sampler.penalty()), dirichlet + wishart + 4 * normal, rtol=0.03)


def test_montecloras_loss():
    """The mean over targets, in training alone; with `use_entropy` the squares of the weights on top."""
    batch = models.inputs("llama")
    settings = dict(kl_loss_weight=0.5, use_entropy=True, sample_scaler=0.0)
    config = veneer.MontecloraLoraConfig(r=3, target_modules=["q_proj", "down_proj"], monteclora_config=settings)
    model = get_peft_model(models.build("llama"), config)
    plain = float(model(**batch, labels=batch["input_ids"]).loss)
    trained = model.train()(**batch, labels=batch["input_ids"]).loss
    samplers = [a.lora_monteclora_sampler for a in state(model).adapters("default").values()]
    terms = [float(s.penalty()) for s in samplers]
    entropy = np.mean([(arr(s.expert_weights) ** 2).sum() for s in samplers])
    assert np.isclose(float(trained) - plain, np.mean(terms), rtol=1e-3) and np.mean(terms) > entropy > 0.1
    trained.backward()
    assert all(s.std_prior.grad.abs().sum() > 0 and s.expert_weights_prior.grad.abs().sum() > 0 for s in samplers)


# MiCA


@places
def test_mica(place: str):
    """B spans the least used outputs: |W^T B| are the smallest singular values."""
    layer, p, W, b = adapt(veneer.MicaConfig, place, r=4, lora_alpha=40)
    adapter = layer.adapters["default"]
    B, A = arr(adapter.lora_B.weight).reshape(len(W), 4), p["lora_A"].reshape(4, -1)
    assert set(p) == {"lora_A"}
    np.testing.assert_allclose(B.T @ B, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(W.T @ B, axis=0), np.linalg.svd(W)[1][-4:], atol=1e-4)
    agree(layer, W + 10 * B @ A, b)


def test_micas_b_stays_in_training():
    model = get_peft_model(models.build("gpt2"), veneer.MicaConfig(r=4, target_modules=["wte", "c_attn"])).train()
    frozen = {name: b.clone() for name, b in model.named_buffers() if "_B" in name}
    optimizer, batch = torch.optim.SGD(model.parameters(), lr=1.0), models.inputs("gpt2")
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    after = dict(model.named_buffers())
    assert len(frozen) == 3 and all(torch.equal(after[name], b) for name, b in frozen.items())
    assert before and all(not torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())
    with pytest.raises(TargetError, match="at least that rank"):
        adapt(veneer.MicaConfig, "linear", r=31)


# Arrow


def arrow(**settings):
    """An adapted layer, and its experts' B A with scaling, in NumPy."""
    sources = list(experts("llama").values())
    config = veneer.ArrowLoraConfig(arrow_config=dict(task_adapter_names=sources) | settings)
    layer = state(get_peft_model(models.build("llama"), config).eval()).layers["model.layers.0.self_attn.q_proj"]
    pairs = [(arr(e.lora_A.weight), arr(e.lora_B.weight)) for e in layer.adapters["default"].experts]
    return layer, pairs


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (2, 1.0), (2, 0.3)])
def test_arrow(k: int, temperature: float):
    layer, pairs = arrow(top_k=k, router_temperature=temperature)
    x = sample(layer.base_layer)
    deltas = [8 / 3 * B @ A for A, B in pairs]
    fit = np.stack([np.abs(arr(x) @ np.linalg.svd(delta)[2][0]) for delta in deltas], -1)
    if k == 1:
        fit = np.where(fit == fit.max(-1, keepdims=True), fit, -np.inf)
    c = softmax(fit / temperature)
    expected = arr(layer.base_layer(x)) + sum(c[..., i : i + 1] * (arr(x) @ d.T) for i, d in enumerate(deltas))
    np.testing.assert_allclose(arr(layer(x)), expected, rtol=1e-4, atol=1e-4)
    assert k == 2 or len(np.unique(c.argmax(-1))) == 2, "both experts serve some token"


def test_general_knowledge_is_taken_off(tmp_path):
    """From A and from B, each expert's, before the directions are found."""
    sources, general = list(experts("llama").values()), []
    for i in range(2):
        config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        perturb(get_peft_model(models.build("llama"), config), seed=7 + i).save_pretrained(tmp_path / str(i))
        general.append(str(tmp_path / str(i)))
    settings = dict(task_adapter_names=sources[:1], top_k=1, use_gks=True, gks_adapter_names=general)
    _, before = arrow(task_adapter_names=sources[:1], top_k=1)
    _, after = arrow(**settings)
    found = [PeftModel.from_pretrained(models.build("llama"), source) for source in general]
    layers = [state(m).layers["model.layers.0.self_attn.q_proj"].adapters["default"] for m in found]
    for i, name in enumerate(("lora_A", "lora_B")):
        mean = np.mean([arr(getattr(layer, name).weight) for layer in layers], axis=0)
        np.testing.assert_allclose(after[0][i], before[0][i] - mean, atol=1e-5)
    with pytest.raises(ConfigError, match="same targets and ranks"):
        arrow(**settings | dict(task_adapter_names=sources, top_k=2))


def test_what_arrow_cannot_route_is_refused(tmp_path):
    sources = list(experts("llama").values())
    for settings, said in (
        (dict(), "task_adapter_names"),
        (dict(task_adapter_names=sources), "top_k"),
        (dict(task_adapter_names=sources, top_k=1, use_gks=True), "gks_adapter_names"),
        (dict(task_adapter_names=sources, top_k=0), "top_k"),
        (dict(task_adapter_names=sources, top_k=1, router_temperature=0.0), "router_temperature"),
    ):
        with pytest.raises(ConfigError, match=said):
            veneer.ArrowLoraConfig(arrow_config=settings)
    get_peft_model(models.build("llama"), veneer.DoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Arrow mixes plain LoRA.*use_dora"):
        arrow(task_adapter_names=[str(tmp_path)], top_k=1)


# aLoRA

PROMPT = [[9, 20, 15, 11, 30, 31], [15, 11, 40, 15, 11, 41], [9, 15, 12, 11, 33, 34]]
"""Invoked by [15, 11] at 2, at 3 (and before, at 0), and never."""
STARTS = [2, 3, 6]


def alora(seed: int = 2, **settings):
    config = veneer.ALoraConfig(
        r=4, lora_alpha=40, target_modules=["q_proj", "down_proj"], alora_invocation_tokens=[15, 11], **settings
    )
    return perturb(get_peft_model(models.build("llama"), config).eval(), seed=seed)


def layer_of(model):
    return state(model).layers["model.layers.1.mlp.down_proj"]


def test_alora():
    """s B A x from the last invocation on, nothing before it."""
    model, ids = alora(), torch.tensor(PROMPT)
    layer, seen = layer_of(model), []
    hook = layer.register_forward_hook(lambda module, args, out: seen.append((arr(args[0]), arr(out))))
    model(ids)
    hook.remove()
    (x, y), adapter = seen[0], layer.adapters["default"]
    change = y - x @ arr(layer.base_layer.weight).T
    expected = 10 * x @ arr(adapter.lora_A.weight).T @ arr(adapter.lora_B.weight).T
    expected[np.arange(6) < np.array(STARTS)[:, None]] = 0
    np.testing.assert_allclose(change, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() > 0.1


def test_before_its_invocation_the_model_is_the_base():
    """So that the cache of a base model's call can be gone on from: the point of aLoRA."""
    model, ids = alora(), torch.tensor(PROMPT)
    with model.disable_adapter():
        base = model(ids).logits
        cache = model(ids[:, :2], use_cache=True).past_key_values
    whole = model(ids).logits
    for row, start in enumerate(STARTS):
        torch.testing.assert_close(whole[row, :start], base[row, :start], **TOLERANCE)
        assert start == 6 or (whole[row, start:] - base[row, start:]).abs().max() > 1e-2
    rest = model(ids[:, 2:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 2:], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("first", [5, 6])
def test_a_call_that_goes_on_from_a_cache_remembers(first: int):
    """Also in a loop of one's own, and with a copy of the cache."""
    model, more = alora(), torch.tensor([[21, 22], [23, 24], [25, 26]])
    ids = torch.cat([torch.tensor(PROMPT), more], dim=1)
    whole = model(ids, alora_offsets=[6, 5, None]).logits
    out = model(ids[:, :first], use_cache=True)
    parts, cache = [out.logits], copy.deepcopy(out.past_key_values)
    for t in range(first, 8):
        out = model(ids[:, t : t + 1], past_key_values=cache)
        parts.append(out.logits)
        cache = out.past_key_values
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **TOLERANCE)


@pytest.mark.parametrize("how", [dict(), dict(num_beams=3), dict(cache_implementation="static", disable_compile=True)])
def test_generate_acts_past_the_prompt(how: dict):
    """With a cache as without one; each row as if it were alone."""
    model, ids = alora(), torch.tensor(PROMPT)
    settings = dict(max_new_tokens=6, do_sample=False, **how)
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    with model.disable_adapter():
        base = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert not torch.equal(tokens[:2], base[:2]) and torch.equal(tokens[2], base[2])
    if not how:
        without = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings)
        assert torch.equal(tokens, without)
    again = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    given = model.generate(ids, attention_mask=torch.ones_like(ids), alora_offsets=[4, 3, None], **settings)
    assert torch.equal(again, tokens) and torch.equal(given, tokens)


def test_two_aloras_in_one_batch():
    model, ids = alora(), torch.tensor(PROMPT)
    other = veneer.ALoraConfig(r=4, target_modules=["q_proj"], lora_alpha=40, alora_invocation_tokens=[9])
    model.add_adapter("other", other)
    perturb(model, "other", 5)
    mixed = model(ids, adapter_names=["default", "other", "other"]).logits
    torch.testing.assert_close(mixed[:1], model(ids[:1]).logits, **TOLERANCE)
    model.set_adapter("other")
    torch.testing.assert_close(mixed[1:], model(ids[1:]).logits, **TOLERANCE)
    with model.disable_adapter():
        base = model(ids).logits
    assert torch.equal(mixed[1], base[1]) and (mixed[2] - base[2]).abs().max() > 1e-2


def test_what_alora_cannot_place_is_refused():
    model, ids = alora(), torch.tensor(PROMPT)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(VeneerError, match="alora_offsets"):
        model(inputs_embeds=embeds)
    by_hand = model(inputs_embeds=embeds, alora_offsets=[4, 3, None]).logits
    torch.testing.assert_close(by_hand, model(ids).logits, **TOLERANCE)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(VeneerError, match="3 rows, and the call has 1"):
        model(ids[:1, :1], past_key_values=cache)
    with pytest.raises(ConfigError, match="SEQ_2_SEQ"):
        veneer.ALoraConfig(alora_invocation_tokens=[1], task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ConfigError, match="token ids"):
        veneer.ALoraConfig(alora_invocation_tokens=[-1])
    with pytest.raises(VeneerError, match="whole model"):
        layer = layer_of(alora())
        layer(torch.randn(2, 3, 45))


# Together

ASKS = {
    "alora_invocation_tokens": dict(alora_invocation_tokens=[15], task_type="CAUSAL_LM"),
    "lora_bias": dict(lora_bias=True),
    "use_dora": dict(use_dora=True),
    "kasa_config": dict(kasa_config={}),
    "monteclora_config": dict(monteclora_config=dict(num_samples=3)),
    "velora_config": dict(velora_config=dict(num_groups=7)),
    "use_qalora": dict(use_qalora=True, qalora_group_size=2),
    "use_bdlora": dict(use_bdlora=dict(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=5)),
    "mica": dict(init_lora_weights="mica"),
    "arrow_config": dict(arrow_config=dict(task_adapter_names=["somewhere"], top_k=1)),
    "use_rslora": dict(use_rslora=True),
    "pissa": dict(init_lora_weights="pissa"),
    "gaussian": dict(init_lora_weights="gaussian"),
}
REFUSED = {
    ("use_bdlora", "mica"): "dense",
    ("use_bdlora", "pissa"): "dense",
    ("use_qalora", "pissa"): "groups of inputs",
    ("kasa_config", "pissa"): "subtracted unscaled",
    **{(name, "arrow_config"): name for name in list(ASKS)[:9]},
}


def test_every_variant_is_paired():
    assert set(LoraConfig.files) <= set(ASKS)


@pytest.mark.parametrize(("one", "two"), list(itertools.combinations(ASKS, 2)), ids=str)
def test_any_two_variants_combine_or_say_why_not(one: str, two: str, tmp_path):
    """Merged equals active, the file brings all of it back, a copy lives on, and all that is to learn does."""
    settings = dict(r=10, lora_alpha=5, target_modules=["q_proj", "o_proj"]) | ASKS[one] | ASKS[two]
    if ASKS[one].keys() & ASKS[two].keys() or ("arrow_config" in (one, two) and two not in LoraConfig.files):
        pytest.skip("two values of one field, or a start where nothing starts")
    if (one, two) in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[one, two]):
            LoraConfig(**settings)
        return
    config, batch = LoraConfig(**settings), models.inputs("llama")
    model = get_peft_model(models.build("llama"), config).eval()
    base = output(models.build("llama"), batch)
    if "kasa_config" not in (one, two):
        torch.testing.assert_close(output(model, batch), base, **TOLERANCE)
    active = output(perturb(model), batch)
    assert (active - base).abs().max() > 1e-3
    learns(model, batch)
    comes_back(model, batch, tmp_path)
    if "alora_invocation_tokens" in (one, two):
        with pytest.raises(NotMergeable):
            model.merge_adapter()
    else:
        model.merge_adapter()
        torch.testing.assert_close(output(model, batch), active, **TOLERANCE)
        model.unmerge_adapter()
        assert torch.equal(output(model, batch), active)


SWAPPED = {name: asked for name, asked in ASKS.items() if name not in ("arrow_config", "pissa")}


@pytest.mark.parametrize("name", SWAPPED)
def test_a_variant_swapped_in_is_the_same_or_refused(name: str, tmp_path):
    """Of a lower rank and with another scaling, and on fewer modules."""
    settings = dict(target_modules=["q_proj", "o_proj"]) | SWAPPED[name]
    batch = models.inputs("llama")
    there = perturb(get_peft_model(models.build("llama"), LoraConfig(r=10, lora_alpha=16, **settings)).eval())
    file = perturb(get_peft_model(models.build("llama"), LoraConfig(r=5, lora_alpha=5, **settings)).eval(), seed=3)
    file.save_pretrained(tmp_path)
    before = output(there, batch)
    if name in ("kasa_config", "use_bdlora", "mica"):
        with pytest.raises(veneer.CheckpointError, match="cannot take the place"):
            veneer.hotswap_adapter(there, tmp_path)
        assert torch.equal(output(there, batch), before)
        with pytest.raises(VeneerError, match="target_rank"):
            veneer.prepare_model_for_compiled_hotswap(there, target_rank=20)
        return
    veneer.hotswap_adapter(there, tmp_path)
    torch.testing.assert_close(output(there, batch), output(file, batch), **TOLERANCE)


def learns(model, batch) -> None:
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad.abs().sum() > 0, name
    model.zero_grad()
    model.eval()
    plan = model.parameter_plan()
    assert plan.expected == plan.total


def comes_back(model, batch, directory) -> None:
    expected, file = output(model, batch), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    model.save_pretrained(directory)
    loaded = PeftModel.from_pretrained(models.build("llama"), directory)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False), loaded):
        assert torch.equal(output(other, batch), expected)
        kinds = [type(layer.adapters["default"]) for layer in state(other).layers.values()]
        assert kinds == [type(layer.adapters["default"]) for layer in state(model).layers.values()]
    assert Config.from_pretrained(directory).to_dict() == loaded.peft_config["default"].to_dict() | {
        "inference_mode": True
    }


def test_three_variants_compile_in_one_graph():
    settings = ASKS["alora_invocation_tokens"] | ASKS["use_dora"] | ASKS["kasa_config"] | ASKS["lora_bias"]
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **settings)
    model, batch = perturb(get_peft_model(models.build("llama"), config).eval()), models.inputs("llama")
    expected = output(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(output(compiled, batch), expected, **TOLERANCE)


@pytest.mark.parametrize("names", [("velora_config", "use_dora"), ("monteclora_config", "kasa_config")], ids=str)
def test_training_compiles_in_one_graph(names):
    """The same loss, terms of the variants included, and the same gradients."""
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **ASKS[names[0]] | ASKS[names[1]])
    model = perturb(get_peft_model(models.build("llama"), config)).train()
    torch._dynamo.reset()
    batch, found = models.inputs("llama"), []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        loss = run(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, **TOLERANCE)


def test_a_plain_config_says_nothing_of_variants(tmp_path):
    content = LoraConfig().to_dict()
    assert not {*LoraConfig.files, "qalora_group_size"} - {"use_dora"} & content.keys()
    given = veneer.QALoraConfig(kasa_config=veneer.KasaConfig(beta=0.5)).to_dict()
    assert given["qalora_group_size"] == 16 and given["kasa_config"] == {"beta": 0.5, "gamma": 1e-3}
    assert Config.from_dict(given).kasa_config == veneer.KasaConfig(beta=0.5)


def test_settings_that_are_wrong_are_refused():
    for settings, said in (
        (dict(kasa_config=dict(beat=1.0)), "beat.*nearest: beta"),
        (dict(kasa_config=dict(beta="much")), "KasaConfig.beta must be float"),
        (dict(kasa_config=veneer.VeloraConfig()), "kasa_config must be a KasaConfig"),
        (dict(kasa_config=dict(gamma=-1.0)), "gamma"),
        (dict(velora_config=dict(num_groups=0)), "num_groups"),
        (dict(velora_config=dict(init_type="mean")), "init_type"),
        (dict(monteclora_config=dict(num_samples=0)), "num_samples"),
        (dict(use_bdlora=True), "use_bdlora"),
    ):
        with pytest.raises(ConfigError, match=said):
            LoraConfig(**settings)
    for preset in (veneer.MicaConfig(), veneer.KasaLoraConfig()):
        field = "kasa_config" if preset.kasa_config else "init_lora_weights"
        with pytest.raises(ConfigError, match=f"{field}=None|{field}=True"):
            type(preset)(**{field: None if field == "kasa_config" else True})
