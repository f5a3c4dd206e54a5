"""Every method against its paper's formula, derived again in NumPy with no code of veneer's.

Parameters leave the adapter as float64 arrays under their names in the file; W is (out, in).
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import veneer
from veneer import get_peft_model
from veneer.methods.adalora import Allocation

from . import models
from .cases import experts

TOLERANCE = dict(rtol=1e-5, atol=2e-5)
PLACES = {
    "linear": ("llama", "model.layers.1.self_attn.q_proj"),
    "narrowing": ("llama", "model.layers.0.mlp.down_proj"),
    "conv1d": ("gpt2", "transformer.h.1.attn.c_attn"),
    "conv": ("conv", "second"),
}
LINEAR = ["linear", "narrowing", "conv1d"]
places = pytest.mark.parametrize("place", PLACES)
linear_places = pytest.mark.parametrize("place", LINEAR)


def arr(t) -> np.ndarray:
    return t.detach().double().numpy()


def state(model):
    return models.state(model)


def attach(model_name: str, config, scale: float = 0.3):
    """A model with one adapter, well off its start."""
    return models.perturb(get_peft_model(models.build(model_name), config).eval(), scale=scale)


def adapt(config_class, place: str, scale: float = 0.3, **settings):
    """One adapted layer: (layer, parameters by name, W (out, in), b)."""
    model_name, path = PLACES[place]
    layer = state(attach(model_name, config_class(target_modules=[path], **settings), scale)).layers[path]
    values = {name.removesuffix(".weight"): arr(p) for name, p in layer.adapters["default"].named_parameters()}
    return layer, values, *base_of(layer.base_layer)


def base_of(module) -> tuple[np.ndarray, np.ndarray]:
    """W (out, in) and b of a module of the base model; the bias is zero where there is none."""
    W = arr(module.weight)
    W = W.T if type(module).__name__ == "Conv1D" else W.reshape(len(W), -1)
    return W, np.zeros(len(W)) if module.bias is None else arr(module.bias)


def run(module, x: np.ndarray, W: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What the module computes with another weight."""
    if not isinstance(module, nn.Conv2d):
        return x @ W.T + b
    patches = np.lib.stride_tricks.sliding_window_view(x, module.kernel_size, axis=(2, 3))
    return np.einsum("bchwij,ocij->bohw", patches, W.reshape(module.weight.shape)) + b[:, None, None]


def sample(module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    if isinstance(module, nn.Conv2d):
        return torch.randn(2, module.in_channels, 5, 6, generator=generator)
    return torch.randn(3, 7, base_of(module)[0].shape[1], generator=generator)


def agree(layer, W: np.ndarray, b: np.ndarray) -> None:
    """The layer computes with W and b, and folds into them; both are far from the pretrained ones."""
    x, base = sample(layer.base_layer), base_of(layer.base_layer)
    assert np.abs(W - base[0]).max() > 0.05
    with torch.no_grad():
        np.testing.assert_allclose(arr(layer(x)), run(layer.base_layer, arr(x), W, b), **TOLERANCE)
        folded_W, folded_b = layer.fold(layer.stack(("default",)))
    np.testing.assert_allclose(arr(folded_W), W, **TOLERANCE)
    np.testing.assert_allclose(0 if folded_b is None else arr(folded_b), b, **TOLERANCE)


@contextmanager
def watching(module):
    """Records (input, output) of a module's calls as arrays."""
    seen = []

    def note(module, args, kwargs, output):
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
        seen.append((arr(x), arr(output[0] if isinstance(output, tuple) else output)))

    hook = module.register_forward_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def block_diagonal(blocks) -> np.ndarray:
    size = sum(len(block) for block in blocks)
    whole, at = np.zeros((size, size)), 0
    for block in blocks:
        whole[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return whole


# Low rank


@places
@pytest.mark.parametrize("rslora", [False, True])
def test_lora(place: str, rslora: bool):
    """W + alpha / r B A; with rsLoRA alpha / sqrt(r)."""
    layer, p, W, b = adapt(veneer.LoraConfig, place, r=3, lora_alpha=5, use_rslora=rslora)
    A, B = p["lora_A"].reshape(3, -1), p["lora_B"].reshape(-1, 3)
    agree(layer, W + 5 / (np.sqrt(3) if rslora else 3) * B @ A, b)


def test_lora_on_an_embedding():
    """E + (s B A)^T: a token's row gains s B A[:, token]."""
    model = attach("gpt2", veneer.LoraConfig(r=3, lora_alpha=5, target_modules=["wte"]))
    layer = state(model).layers["transformer.wte"]
    adapter, ids = layer.adapters["default"], torch.tensor([[3, 66, 0], [5, 5, 41]])
    E = arr(layer.base_layer.weight) + 5 / 3 * (arr(adapter.lora_embedding_B) @ arr(adapter.lora_embedding_A)).T
    np.testing.assert_allclose(arr(layer(ids)), E[ids.numpy()], **TOLERANCE)


@linear_places
def test_pissa(place: str):
    """W_res + s B A, where W_res is W less its r principal components."""
    layer, p, W, b = adapt(veneer.LoraConfig, place, r=3, lora_alpha=5, init_lora_weights="pissa")
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    principal = U[:, :3] * S[:3] @ Vt[:3]
    agree(layer, W - principal + 5 / 3 * p["lora_B"] @ p["lora_A"], b)


def test_pissa_starts_at_the_principal_part():
    """s B A is the best rank-r approximation of W, shared evenly between A and B."""
    _, p, W, _ = adapt(veneer.LoraConfig, "linear", 0.0, r=3, lora_alpha=5, init_lora_weights="pissa")
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    np.testing.assert_allclose(5 / 3 * p["lora_B"] @ p["lora_A"], U[:, :3] * S[:3] @ Vt[:3], **TOLERANCE)
    np.testing.assert_allclose(p["lora_A"] @ p["lora_A"].T, np.diag(S[:3]) * 3 / 5, **TOLERANCE)


@places
def test_dora(place: str):
    """m (W + s B A) / |W + s B A| by rows; the bias is outside."""
    layer, p, W, b = adapt(veneer.DoraConfig, place, r=3, lora_alpha=5)
    V = W + 5 / 3 * p["lora_B"].reshape(-1, 3) @ p["lora_A"].reshape(3, -1)
    agree(layer, p["lora_magnitude_vector"].reshape(-1, 1) * V / np.sqrt((V**2).sum(1, keepdims=True)), b)


def test_dora_starts_with_the_norms_of_the_rows():
    _, p, W, _ = adapt(veneer.DoraConfig, "linear", 0.0, r=3)
    np.testing.assert_allclose(p["lora_magnitude_vector"], np.sqrt((W**2).sum(1)), **TOLERANCE)


def test_doras_norm_is_held_constant_in_the_backward_pass():
    """Section 4.3: dL/dA = s B^T diag(m / |V|) dL/dW', as if |V| did not depend on A."""
    layer, p, W, _ = adapt(veneer.DoraConfig, "linear", r=3, lora_alpha=5)
    x, G = sample(layer.base_layer), np.random.default_rng(0).normal(size=(3, 7, len(W)))
    layer(x).mul(torch.tensor(G)).sum().backward()
    V = W + 5 / 3 * p["lora_B"] @ p["lora_A"]
    scale = p["lora_magnitude_vector"] / np.sqrt((V**2).sum(1))
    expected = 5 / 3 * p["lora_B"].T @ (scale[:, None] * np.einsum("bto,bti->oi", G, arr(x)))
    np.testing.assert_allclose(arr(layer.adapters["default"].lora_A.weight.grad), expected, rtol=1e-4, atol=1e-4)


def test_vera():
    """W + diag(b) B diag(d) A, with A and B cut from one pair for targets of every size."""
    model = attach("llama", veneer.VeraConfig(r=5, target_modules=["q_proj", "k_proj", "down_proj"]))
    for path, layer in state(model).layers.items():
        (W, b), adapter = base_of(layer.base_layer), layer.adapters["default"]
        shared = state(model).shared["default"]
        A, B = arr(shared.vera_A)[:, : W.shape[1]], arr(shared.vera_B)[: W.shape[0]]
        assert A.shape == (5, W.shape[1]) and B.shape == (W.shape[0], 5), path
        update = np.diag(arr(adapter.vera_lambda_b)) @ B @ np.diag(arr(adapter.vera_lambda_d)) @ A
        agree(layer, W + update, b)


@linear_places
def test_fourierft(place: str):
    """The inverse Fourier transform written out: alpha / (out in) sum_k c_k cos(2 pi (i u_k / out + j v_k / in))."""
    layer, p, W, b = adapt(veneer.FourierFTConfig, place, n_frequency=29, scaling=170.0)
    u, v = np.divmod(layer.adapters["default"].places.numpy(), W.shape[1])
    i, j = np.mgrid[: W.shape[0], : W.shape[1]][..., None]
    angle = 2 * np.pi * (i * u / W.shape[0] + j * v / W.shape[1])
    agree(layer, W + 170 / W.size * (p["fourierft_spectrum"] * np.cos(angle)).sum(-1), b)


@linear_places
def test_adalora(place: str):
    """W + s B diag(E) A, with s = alpha / init_r."""
    layer, p, W, b = adapt(veneer.AdaLoraConfig, place, init_r=5, target_r=2, lora_alpha=7, total_step=9)
    agree(layer, W + 7 / 5 * p["lora_B"] @ np.diag(p["lora_E"][:, 0]) @ p["lora_A"], b)


# Scalings and rotations


@places
def test_ia3_on_the_output(place: str):
    """l (W x + b)."""
    layer, p, W, b = adapt(veneer.IA3Config, place, feedforward_modules=[])
    ell = p["ia3_l"].reshape(-1)
    agree(layer, ell[:, None] * W, ell * b)


@places
def test_ia3_on_the_input(place: str):
    """W (l x) + b; in a convolution l scales input channels."""
    layer, p, W, b = adapt(veneer.IA3Config, place, feedforward_modules=[PLACES[place][1]])
    ell = p["ia3_l"].reshape(-1)
    agree(layer, W * np.repeat(ell, W.shape[1] // len(ell)), b)


@places
@pytest.mark.parametrize("r", [3, 4])
def test_hra(place: str, r: int):
    """W H_1 H_2 ... H_r, with H_i = I - 2 u_i u_i^T / |u_i|^2."""
    layer, p, W, b = adapt(veneer.HRAConfig, place, r=r, init_weights=False)
    for u in p["hra_u"].T:
        W = W @ (np.eye(len(u)) - 2 * np.outer(u, u) / (u @ u))
    agree(layer, W, b)


@places
def test_hra_with_gram_schmidt(place: str):
    """Reflections along the orthonormal basis of the vectors (of a QR decomposition): together I - 2 Q Q^T."""
    layer, p, W, b = adapt(veneer.HRAConfig, place, r=3, init_weights=False, apply_GS=True)
    Q, _ = np.linalg.qr(p["hra_u"])
    agree(layer, W @ (np.eye(len(Q)) - 2 * Q @ Q.T), b)


def skews(entries: np.ndarray, size: int) -> list[np.ndarray]:
    upper = np.zeros((len(entries), size, size))
    upper[(slice(None), *np.triu_indices(size, 1))] = entries
    return [U - U.T for U in upper]


@places
@pytest.mark.parametrize("block_share", [False, True])
def test_oft_exact(place: str, block_share: bool):
    """x' = R^T x by blocks, R = (I - Q) (I + Q)^-1 and orthogonal."""
    settings = dict(oft_block_size=0, r=3, use_cayley_neumann=False, block_share=block_share)
    layer, p, W, b = adapt(veneer.OFTConfig, place, **settings)
    size = W.shape[1] // 3
    rotations = [(np.eye(size) - Q) @ np.linalg.inv(np.eye(size) + Q) for Q in skews(p["oft_R"], size)]
    R = block_diagonal(rotations * (3 if block_share else 1))
    np.testing.assert_allclose(R @ R.T, np.eye(len(R)), atol=1e-9)
    agree(layer, W @ R.T, b)


@places
@pytest.mark.parametrize("terms", [4, 5, 6])
def test_oft_neumann(place: str, terms: int):
    """(I - Q)^-1 is I + Q + Q^2 + ..., so the transform is (I + Q) times as many powers as `terms` leaves."""
    layer, p, W, b = adapt(veneer.OFTConfig, place, 0.1, oft_block_size=5, num_cayley_neumann_terms=terms)
    size = W.shape[1] // len(p["oft_R"])
    assert size > 2

    def rotation(Q):
        return (np.eye(size) + Q) @ sum(np.linalg.matrix_power(Q, k) for k in range(terms - 1))

    agree(layer, W @ block_diagonal([rotation(Q) for Q in skews(p["oft_R"], size)]).T, b)


def test_oft_keeps_small_rotations_small():
    """Constrained OFT: a Q longer than eps / sqrt(blocks) is cut to that length."""
    settings = dict(oft_block_size=5, coft=True, eps=1.65, use_cayley_neumann=False)
    layer, p, W, b = adapt(veneer.OFTConfig, "linear", 0.15, **settings)
    Qs, limit, eye = skews(p["oft_R"], 5), 1.65 / np.sqrt(6), np.eye(5)
    lengths = [np.sqrt((Q**2).sum()) for Q in Qs]
    assert min(lengths) < limit < max(lengths), "both kinds of block must occur"
    Qs = [Q * min(1, limit / length) for Q, length in zip(Qs, lengths, strict=True)]
    agree(layer, W @ block_diagonal([(eye - Q) @ np.linalg.inv(eye + Q) for Q in Qs]).T, b)


def test_oft_on_an_embedding():
    """A token's vector times the blocks of R."""
    config = veneer.OFTConfig(target_modules=["embed_tokens"], oft_block_size=5, use_cayley_neumann=False)
    (layer,) = state(attach("llama", config)).layers.values()
    Qs = skews(arr(layer.adapters["default"].oft_embedding_R.weight), 5)
    R = block_diagonal([(np.eye(5) - Q) @ np.linalg.inv(np.eye(5) + Q) for Q in Qs])
    ids = torch.tensor([[3, 11, 66]])
    np.testing.assert_allclose(arr(layer(ids)), arr(layer.base_layer.weight)[ids[0]][None] @ R, atol=1e-5)
    assert np.abs(R - np.eye(len(R))).max() > 0.05


# Norms and tokens


def test_ln_tuning_on_rms_norms():
    """x / sqrt(mean(x^2) + eps) w'."""
    model = attach("llama", veneer.LNTuningConfig())
    layers = state(model).layers
    assert set(layers) == {"model.norm"} | {
        f"model.layers.{i}.{n}" for i in (0, 1) for n in ("input_layernorm", "post_attention_layernorm")
    }
    for layer in layers.values():
        x, w = sample(nn.Linear(30, 1)), arr(layer.adapters["default"].ln_tuning_layers.weight)
        assert np.abs(w - arr(layer.base_layer.weight)).max() > 0.1
        norm = np.sqrt((arr(x) ** 2).mean(-1, keepdims=True) + layer.base_layer.variance_epsilon)
        np.testing.assert_allclose(arr(layer(x)), arr(x) / norm * w, **TOLERANCE)


def test_ln_tuning_on_layer_norms():
    """(x - mean) / sqrt(var + eps) w' + b'."""
    for layer in state(attach("gpt2", veneer.LNTuningConfig(target_modules=["ln_1", "ln_f"]))).layers.values():
        x, copy = sample(nn.Linear(30, 1)), layer.adapters["default"].ln_tuning_layers
        assert np.abs(arr(copy.bias) - arr(layer.base_layer.bias)).max() > 0.1
        centred = arr(x) - arr(x).mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + layer.base_layer.eps)
        np.testing.assert_allclose(arr(layer(x)), normed * arr(copy.weight) + arr(copy.bias), **TOLERANCE)


def test_trainable_tokens_and_a_tied_head():
    """E' is E with some rows learned, for the lookup and for the logits h E'^T."""
    chosen = [41, 3, 66]
    model = attach("gpt2", veneer.TrainableTokensConfig(token_indices=chosen))
    layers, ids = state(model).layers, torch.tensor([[3, 5, 66], [41, 41, 0]])
    E = arr(layers["transformer.wte"].base_layer.weight)
    E_new = E.copy()
    E_new[chosen] = arr(layers["transformer.wte"].adapters["default"].trainable_tokens_delta)
    assert np.abs(E_new - E)[chosen].min(1).max() > 1e-3
    np.testing.assert_allclose(arr(layers["transformer.wte"](ids)), E_new[ids.numpy()], **TOLERANCE)
    with watching(layers["lm_head"]) as seen, torch.no_grad():
        logits = model(input_ids=ids).logits
    np.testing.assert_allclose(arr(logits), seen[0][0] @ E_new.T, **TOLERANCE)


# Blocks, gates and prompts


@pytest.mark.parametrize(
    ("placement", "places", "reduction", "f", "s"),
    [
        ("houlsby", ["self_attn.o_proj", "mlp.down_proj"], 16, silu, 1),
        ("pfeiffer", ["mlp.down_proj"], 16, relu, 1),
        ("parallel", ["mlp"], 2, relu, 4),
    ],
)
def test_bottleneck(placement, places, reduction, f, s):
    """y + up(f(down(y))) after the sublayer's last module, or y + s up(f(down(x))) beside the MLP."""
    model = attach("llama", veneer.BottleneckConfig(placement=placement))
    layers = state(model).layers
    assert list(layers) == [f"model.layers.{i}.{place}" for i in (0, 1) for place in places]
    for layer in layers.values():
        p = {name: arr(t) for name, t in layer.adapters["default"].named_parameters()}
        assert p["adapter_down.weight"].shape == (30 // reduction, 30)
        with watching(layer.base_layer) as seen, torch.no_grad():
            out = layer(sample(nn.Linear(getattr(layer.base_layer, "in_features", 30), 1)))
        x, y = seen[0]
        hidden = f((x if placement == "parallel" else y) @ p["adapter_down.weight"].T + p["adapter_down.bias"])
        expected = y + s * (hidden @ p["adapter_up.weight"].T + p["adapter_up.bias"])
        assert np.abs(expected - y).max() > 0.05
        np.testing.assert_allclose(arr(out), expected, **TOLERANCE)


@pytest.mark.parametrize("top_k", [None, 1])
@pytest.mark.parametrize("layerwise", [False, True])
def test_xlora(layerwise: bool, top_k: int | None):
    """W x + b + g sum_i s_i (alpha / r) B_i A_i x; s by softmax from the base model's last hidden states."""
    sources = experts("llama")
    gate = dict(xlora_depth=2, xlora_size=11, layerwise_scalings=layerwise, softmax_temperature=0.7, top_k_lora=top_k)
    model = attach("llama", veneer.XLoraConfig(adapters=sources, global_scaling_weight=1.3, **gate))
    files = [load_file(f"{sources[i]}/adapter_model.safetensors") for i in ("0", "1")]
    ids = torch.randint(3, 67, (2, 6))
    paths = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
    assert list(state(model).layers) == paths

    h = arr(models.build("llama").model(input_ids=ids)[0])
    W1, b1, W2, b2 = (arr(t) for t in state(model).shared["default"].parameters())
    logits = relu(h @ W1.T + b1) @ W2.T + b2
    s = softmax(logits.reshape(2, 6, -1, 2) / 0.7)
    s = np.where(s == s.max(-1, keepdims=True), s, 0) if top_k else s
    for i, path in enumerate(paths):
        layer = state(model).layers[path]
        with watching(layer) as seen, torch.no_grad():
            model(input_ids=ids)
        (x, y), (W, b) = seen[-1], base_of(layer.base_layer)
        expected, here = x @ W.T + b, s[:, :, i if layerwise else 0]
        for k, file in enumerate(files):
            A, B = (file.get(f"base_model.model.{path}.lora_{side}.weight") for side in "AB")
            expected += 0 if A is None else 1.3 * here[..., k, None] * (8 / 3 * x @ A.T @ B.T)
        assert np.abs(expected - x @ W.T - b).max() > 0.01
        np.testing.assert_allclose(y, expected, **TOLERANCE)


@pytest.mark.parametrize("projected", [False, True])
def test_prefix_tuning(projected: bool):
    """softmax(q [P_K, K]^T / sqrt(d)) [P_V, V] in every layer; a projected prefix is MLP(p); tokens stand after it."""
    n, heads, d = 3, 5, 6
    settings = dict(prefix_projection=True, encoder_hidden_size=11) if projected else {}
    model = attach("gpt2", veneer.PrefixTuningConfig(num_virtual_tokens=n, task_type="CAUSAL_LM", **settings))
    p = {name: arr(t) for name, t in state(model).prompts["default"].named_parameters()}
    if projected:
        hidden = np.tanh(p["embedding.weight"] @ p["transform.0.weight"].T + p["transform.0.bias"])
        P = hidden @ p["transform.2.weight"].T + p["transform.2.bias"]
    else:
        P = p["prompt_embeddings"]
    P = P.reshape(n, 2, 2, heads, d)  # position, layer, key or value
    body, ids = model.get_base_model().transformer, torch.randint(3, 67, (2, 4))
    with watching(body.drop) as start, watching(body.h[0].attn) as first, watching(body.h[1].attn) as second:
        model(input_ids=ids)
    embedded = arr(body.wte.weight)[ids] + arr(body.wpe.weight)[n : n + 4]
    np.testing.assert_allclose(start[0][0], embedded, **TOLERANCE)
    for i, (h, out) in enumerate((first[0], second[0])):
        (W, b), (W_out, b_out) = base_of(body.h[i].attn.c_attn), base_of(body.h[i].attn.c_proj)
        q, k, v = (part.reshape(2, 4, heads, d) for part in np.split(h @ W.T + b, 3, axis=-1))
        k, v = (np.concatenate([np.stack([P[:, i, j]] * 2), own], axis=1) for j, own in enumerate((k, v)))
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(d)
        scores = np.where(np.arange(4)[:, None] + n >= np.arange(4 + n), scores, -np.inf)
        mixed = np.einsum("bhqk,bkhd->bqhd", softmax(scores), v).reshape(2, 4, -1)
        np.testing.assert_allclose(out, mixed @ W_out.T + b_out, **TOLERANCE)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompt_tuning(name: str):
    """The base model on [p_1 ... p_n, E(x_1) ... E(x_T)]."""
    model = attach(name, veneer.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    base, ids = models.build(name), torch.randint(3, 67, (2, 4))
    E, P = arr(base.get_input_embeddings().weight), arr(state(model).prompts["default"].prompt_embeddings)
    assert P.shape == (3, 30)
    embedded = np.concatenate([np.stack([P, P]), E[ids]], axis=1)
    with torch.no_grad():
        expected = base(inputs_embeds=torch.tensor(embedded, dtype=torch.float32)).logits
        np.testing.assert_allclose(arr(model(input_ids=ids).logits), arr(expected), **TOLERANCE)


# AdaLoRA's allocation


class Paper:
    """Algorithm 1 of arXiv:2303.10512 over dicts of arrays."""

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.mean: dict = {}
        self.spread: dict = {}

    def observe(self, key, w: np.ndarray, g: np.ndarray) -> None:
        now = np.abs(w * g)  # eq. 8
        mean = self.mean[key] = self.beta1 * self.mean.get(key, 0) + (1 - self.beta1) * now  # eq. 9
        self.spread[key] = self.beta2 * self.spread.get(key, 0) + (1 - self.beta2) * np.abs(now - mean)  # eq. 10

    def scores(self, path: str) -> np.ndarray:
        s = {name: self.mean[path, name] * self.spread[path, name] for name in ("lora_A", "lora_B", "lora_E")}  # eq. 11
        return s["lora_E"][:, 0] + s["lora_A"].mean(1) + s["lora_B"].mean(0)  # eq. 12


def test_adalora_kills_the_triplets_the_paper_kills():
    """Over ten steps of moving weights and random gradients, on targets of unequal sizes."""
    T, ti, tf, r, goal, every = 14, 2, 3, 5, 2, 2
    config = veneer.AdaLoraConfig(
        init_r=r, target_r=goal, total_step=T, tinit=ti, tfinal=tf, deltaT=every, beta1=0.7, beta2=0.6,
        target_modules=["q_proj", "k_proj", "down_proj"],
    )  # fmt: skip
    adapters = state(attach("llama", config)).adapters("default")
    allocation, paper = Allocation(config, adapters), Paper(0.7, 0.6)
    generator, dead, counts = torch.Generator().manual_seed(4), {}, []
    for step in range(1, T + 1):
        for path, adapter in adapters.items():
            for name, p in adapter.named_parameters():
                p.data += torch.randn(p.shape, generator=generator) * 0.05
                p.grad = torch.randn(p.shape, generator=generator) * (1 + 3 * ("down" in path))
                if step < T - tf:
                    paper.observe((path, name), arr(p), arr(p.grad))
        allocation.step(step)
        if (ti < step < T - tf and step % every == 0) or step == T - tf:
            share = 1 - (step - ti) / (T - tf - ti)
            budget = int(goal * 6 + (r * 6 - goal * 6) * share**3)  # eq. 13, from the end of the warm-up on
            scores = {path: paper.scores(path) for path in adapters}
            for path, score in scores.items():
                np.testing.assert_allclose(arr(allocation.importance(path)), score, rtol=1e-4)
            order = np.sort(np.concatenate(list(scores.values())))
            dead = {path: score < order[len(order) - budget] for path, score in scores.items()}
            counts.append(sum(d.sum() for d in dead.values()))
        kills = step in (4, 6, 8, 10) or step >= T - tf
        for path, adapter in adapters.items():
            zero = arr(adapter.lora_E)[:, 0] == 0
            assert (zero == (dead[path] if kills else False)).all(), (step, path)
    assert len(counts) == 5 and counts == sorted(counts) and 0 < counts[0] < counts[1] and counts[-1] == 6 * (r - goal)
    assert len({d.sum() for d in dead.values()}) > 2, "the ranks must end up unequal"


def test_adaloras_budget_is_the_whole_before_and_the_goal_after():
    config = veneer.AdaLoraConfig(init_r=6, target_r=2, total_step=30, tinit=5, tfinal=4, target_modules=["q_proj"])
    allocation = Allocation(config, state(attach("llama", config)).adapters("default"))
    assert allocation.budget(5) == 12 and allocation.budget(26) == allocation.budget(29) == 4
    halfway = 4 + (12 - 4) * (1 - 11 / 21) ** 3
    assert allocation.budget(16) == int(halfway) == 4 and allocation.budget(7) == int(4 + 8 * (1 - 2 / 21) ** 3) == 9


def test_adaloras_loss_keeps_the_factors_orthogonal():
    """gamma times the mean of |A A^T - I| and |B^T B - I| (eq. 4, not squared: so does the authors' code)."""
    settings = dict(init_r=4, target_r=2, total_step=9, target_modules=["q_proj", "down_proj"])
    config = veneer.AdaLoraConfig(orth_reg_weight=0.3, **settings)
    model, batch = attach("llama", config), models.inputs("llama")
    norms = []
    for adapter in state(model).adapters("default").values():
        A, B = arr(adapter.lora_A), arr(adapter.lora_B)
        norms += [np.sqrt(((P - np.eye(4)) ** 2).sum()) for P in (A @ A.T, B.T @ B)]
    with_term = model(**batch, labels=batch["input_ids"]).loss
    with torch.no_grad():
        without = model(**batch, labels=batch["input_ids"]).loss
    np.testing.assert_allclose(float(with_term.detach() - without), 0.3 * np.mean(norms), **TOLERANCE)
