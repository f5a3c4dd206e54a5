"""Updates in structured factors, against their papers' formulas derived again in NumPy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from veneer import ConfigError, PeftModel, TargetError, get_peft_model
from veneer.maths.activations import ACTIVATIONS
from veneer.maths.kronecker import two_factors

from . import models
from .test_numpy import adapt, agree, arr, attach, base_of, linear_places, places, relu, sample, silu, state


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


@linear_places
def test_miss(place: str):
    """Column i of W gets row i mod r of D, whether or not r divides in."""
    layer, p, W, b = adapt(veneer.MissConfig, place, r=4)
    assert W.shape[1] % 4
    agree(layer, W + p["miss_block"][np.arange(W.shape[1]) % 4].T, b)


@linear_places
def test_miss_mini(place: str):
    """W[o, i] gets D[i mod r, o mod mini_r]."""
    layer, p, W, b = adapt(veneer.MissConfig, place, r=4, mini_r=5, init_weights="mini")
    rows, columns = np.arange(W.shape[1]) % 4, np.arange(W.shape[0]) % 5
    agree(layer, W + p["miss_block"][rows[None, :], columns[:, None]], b)


@linear_places
def test_miss_bat(place: str):
    """Block by block: W'_ij = W_ij (I + D_i) + D_i."""
    layer, p, W, b = adapt(veneer.MissConfig, place, r=5, init_weights="bat")
    moved = W.copy()
    for i, D in enumerate(p["miss_block"]):
        for j in range(W.shape[1] // 5):
            block = np.s_[5 * i : 5 * i + 5, 5 * j : 5 * j + 5]
            moved[block] = W[block] @ (np.eye(5) + D) + D
    agree(layer, moved, b)


@pytest.mark.parametrize("how", [True, "bat"], ids=str)
def test_a_bone_file_is_a_miss_file(how: bool | str, tmp_path):
    """What PEFT 0.13 to 0.18 wrote; saved again it has today's names."""
    settings = dict(r=5, target_modules=["q_proj", "down_proj"], init_weights=how, bias="MiSS_only")
    model = attach("llama", veneer.MissConfig(**settings))
    model.save_pretrained(tmp_path / "miss")
    config = json.loads((tmp_path / "miss" / "adapter_config.json").read_text())
    assert config.pop("mini_r") == 1 and config.pop("miss_dropout") == 0
    config |= {"peft_type": "BONE", "bias": "Bone_only"}
    tensors = load_file(tmp_path / "miss" / "adapter_model.safetensors")
    (tmp_path / "bone").mkdir()
    (tmp_path / "bone" / "adapter_config.json").write_text(json.dumps(config))
    old = {key.replace(".miss_", ".bone_"): tensor for key, tensor in tensors.items()}
    save_file(old, tmp_path / "bone" / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path / "bone")
    batch = models.inputs("llama")
    assert torch.equal(models.output(loaded, batch), models.output(model, batch))
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == tensors.keys() != old.keys()
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["peft_type"] == "MISS"


def test_miss_limits():
    for settings in (dict(r=31), dict(r=2, mini_r=4, init_weights="mini"), dict(r=4, init_weights="bat")):
        with pytest.raises(ConfigError, match="q_proj"):
            get_peft_model(models.build("llama"), veneer.MissConfig(target_modules=["q_proj"], **settings))
    for settings in (dict(init_weights="bone"), dict(r=0), dict(bias="lora_only"), dict(bias="miss")):
        with pytest.raises(ConfigError):
            veneer.MissConfig(**settings)


def test_miss_dropout_falls_on_the_input():
    layer, p, *_ = adapt(veneer.MissConfig, "linear", r=4, miss_dropout=0.5)
    x = torch.ones(400, 30)
    base = layer.base_layer(x)
    change = (layer.train()(x) - base).detach()
    assert change.std(0).min() > 0.01
    np.testing.assert_allclose(arr(change.mean(0)), p["miss_block"][np.arange(30) % 4].sum(0), atol=0.4)
    assert torch.equal(layer.eval()(x), layer(x))


def kron(one: np.ndarray, two: np.ndarray, left: bool = True) -> np.ndarray:
    """The Kronecker product of a matrix and, for each place in a kernel, another; (out, in * kernel)."""
    blocks = [np.kron(one, K) if left else np.kron(K, one) for K in np.moveaxis(two.reshape(*two.shape[:2], -1), 2, 0)]
    return np.stack(blocks, axis=2).reshape(one.shape[0] * two.shape[0], -1)


@places
def test_lokr(place: str):
    """W + alpha / r (W1 kron A2 B2); the kernel belongs to W2."""
    layer, p, W, b = adapt(veneer.LoKrConfig, place, r=1, alpha=5)
    assert set(p) == {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}
    agree(layer, W + 5 * np.kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"]), b)


@places
def test_lokr_with_both_low_rank(place: str):
    layer, p, W, b = adapt(veneer.LoKrConfig, place, r=1, alpha=5, decompose_both=True)
    agree(layer, W + 5 * np.kron(p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w2_a"] @ p["lokr_w2_b"]), b)


@places
def test_lokr_with_both_whole(place: str):
    layer, p, W, b = adapt(veneer.LoKrConfig, place, r=20, alpha=30)
    assert set(p) == {"lokr_w1", "lokr_w2"}
    agree(layer, W + 30 / 20 * kron(p["lokr_w1"], p["lokr_w2"]), b)


def test_lokr_with_a_core():
    """Proposition 3 of FedPara for W2: sum_ij T[i, j, kernel] A[i, out2] B[j, in2]."""
    layer, p, W, b = adapt(veneer.LoKrConfig, "conv", r=1, alpha=30, use_effective_conv2d=True)
    two = np.einsum("ijkl,io,jc->ockl", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
    agree(layer, W + 30 * kron(p["lokr_w1"], two), b)


@pytest.mark.parametrize("r", [1, 8])
@pytest.mark.parametrize("core", [False, True])
def test_lokr_on_a_conv1d(r: int, core: bool):
    """As in PEFT's files: a whole W2 stands on the left, else W1 does."""
    config = veneer.LoKrConfig(r=r, alpha=7, target_modules=["third"], use_effective_conv2d=core)
    layer = state(attach("conv", config)).layers["third"]
    p = {name: arr(v) for name, v in layer.adapters["default"].named_parameters()}
    if r == 8:
        expected = kron(p["lokr_w1"], p["lokr_w2"], left=False)
    elif core:
        two = np.einsum("ijkl,io,jc->ock", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
        expected = kron(p["lokr_w1"], two)
    else:
        expected = np.kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"])
    np.testing.assert_allclose(arr(layer.adapters["default"].delta()), 7 / r * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 30, 36, 45, 127, 128])
@pytest.mark.parametrize("factor", [-1, 0, 1, 2, 4, 5, 6, 11, 200])
def test_sizes_of_kronecker_factors(size: int, factor: int):
    """Where `factor` does not divide: the most even of the pairs whose smaller side is at most `factor`."""
    one, two = two_factors(size, factor)
    assert one * two == size
    if factor > 0 and size % factor == 0:
        assert one == factor
    else:
        pairs = [(d, size // d) for d in range(1, size + 1) if size % d == 0 and d * d <= size]
        assert (one, two) == max(p for p in pairs if factor == -1 or p[0] <= max(factor, 1))


def test_lokr_starts():
    """At zero by W1, in LyCORIS' way by W2; its rank is the product of the factors' ranks."""
    for settings, zero in (({}, "lokr_w1"), (dict(init_weights="lycoris"), "lokr_w2_b")):
        _, p, *_ = adapt(veneer.LoKrConfig, "linear", 0.0, r=2, **settings)
        assert [name for name, value in p.items() if not value.any()] == [zero]
    layer, p, *_ = adapt(veneer.LoKrConfig, "linear", r=2)
    with torch.no_grad():
        assert np.linalg.matrix_rank(layer.adapters["default"].delta().numpy(), tol=1e-4) == 2 * min(p["lokr_w1"].shape)
    for settings in (dict(r=0), dict(decompose_factor=-2), dict(init_weights="lora")):
        with pytest.raises(ConfigError):
            veneer.LoKrConfig(**settings)


@linear_places
@pytest.mark.parametrize("hybrid", [0, 2])
def test_gralora(place: str, hybrid: int):
    """Block (i, j) of the update is B_ij A_ij, each of rank r / k."""
    k, r, s = 5, 10, 2
    layer, p, W, b = adapt(veneer.GraloraConfig, place, r=r, gralora_k=k, alpha=5, hybrid_r=hybrid)
    A, B = p["gralora_A"], p["gralora_B"]
    rows = [[(A[j][:, s * i : s * i + s] @ B[i][s * j : s * j + s]).T for j in range(k)] for i in range(k)]
    update = np.block(rows)
    assert np.linalg.matrix_rank(update, tol=1e-6) == min(k * r, *W.shape)
    if hybrid:
        update = update + p["gralora_B_general"] @ p["gralora_A_general"]
    agree(layer, W + 5 / (r + hybrid) * update, b)


def test_gralora_with_one_block_is_lora():
    layer, p, W, b = adapt(veneer.GraloraConfig, "linear", r=4, gralora_k=1, alpha=6)
    agree(layer, W + 6 / 4 * (p["gralora_A"][0] @ p["gralora_B"][0]).T, b)


def test_graloras_limits():
    with pytest.raises(ConfigError, match="gralora_k = 4 on .*q_proj"):
        get_peft_model(models.build("llama"), veneer.GraloraConfig(gralora_k=4, target_modules=["q_proj"]))
    for settings in (dict(r=5), dict(gralora_k=0), dict(hybrid_r=-1), dict(gralora_dropout=1.0)):
        with pytest.raises(ConfigError):
            veneer.GraloraConfig(**settings)


@linear_places
def test_peanut(place: str):
    """W + s (relu(W^T A^T) B^T)^T."""
    layer, p, W, b = adapt(veneer.PeanutConfig, place, r=3, scaling=1.5)
    agree(layer, W + 1.5 * (relu(W.T @ p["peanut_A"].T) @ p["peanut_B"].T).T, b)


@linear_places
def test_peanut_in_depth(place: str):
    """Two layers down, two back; each layer back adds what the layer of its height down read."""
    layer, p, W, b = adapt(veneer.PeanutConfig, place, r=3, depth=2, act_fn="silu", scaling=0.7)
    E, D = ([p[f"peanut_{side}.{i}"] for i in range(2)] for side in ("encoders", "decoders"))
    h0 = silu(W.T @ p["peanut_A"].T)
    h1 = silu(h0 @ E[0].T)
    h2 = silu(h1 @ E[1].T)
    back = silu(h2 @ D[0].T) + h1
    back = silu(back @ D[1].T) + h0
    agree(layer, W + 0.7 * (back @ p["peanut_B"].T).T, b)


def test_peanut_reads_the_pretrained_weight_under_a_merged_adapter():
    model = attach("llama", veneer.PeanutConfig(r=3, target_modules=["q_proj"]))
    model.add_adapter("two", veneer.LoraConfig(r=2, target_modules=["q_proj"]))
    models.perturb(model, "two", scale=0.3)
    model.set_adapter(["two", "default"])
    batch = models.inputs("llama")
    active = models.output(model, batch)
    model.merge_adapter(["two"])
    torch.testing.assert_close(models.output(model, batch), active, rtol=1e-4, atol=1e-5)
    model.merge_adapter(["default"])
    torch.testing.assert_close(models.output(model, batch), active, rtol=1e-4, atol=1e-5)


def test_activations_are_those_of_transformers():
    activations = pytest.importorskip("transformers.activations")
    assert set(ACTIVATIONS) == set(activations.ACT2FN) - {"xielu"} | {"leakyrelu"}
    x = torch.linspace(-12, 12, 241)
    for name, function in ACTIVATIONS.items():
        name = {"leakyrelu": "leaky_relu"}.get(name, name)  # AdapterHub's spelling
        with torch.no_grad():
            torch.testing.assert_close(function(x), activations.ACT2FN[name](x))


def test_peanuts_limits():
    with pytest.raises(ConfigError, match="relu"):
        veneer.PeanutConfig(act_fn="rleu")
    for settings in (dict(act_fn="xielu"), dict(act_fn="leakyrelu"), dict(r=0), dict(depth=-1)):
        with pytest.raises(ConfigError):
            veneer.PeanutConfig(**settings)


def glora_path(p: dict, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One path of a GLoRA as an array of its full shape."""
    if f"glora_{name}.Xd" in p:
        return p[f"glora_{name}.Xd"] @ p[f"glora_{name}.Xu"]
    X = p.get(f"glora_{name}.X", np.zeros(1))
    return np.broadcast_to(X, shape)


@linear_places
@pytest.mark.parametrize("A_B", ["lora", "vector", "constant", "none"])
@pytest.mark.parametrize(("C", "D_E"), [("lora", "vector"), ("vector", "constant"), ("none", "none")])
def test_glora(place: str, A_B: str, C: str, D_E: str):
    """W + W * A + B and b + b * D + E + W C; no C, D and E where there is no bias."""
    if A_B == "none" and (D_E == "none" or place == "narrowing"):
        pytest.skip("nothing would train")
    layer, p, W, b = adapt(veneer.GloraConfig, place, r=3, config_A_B=A_B, config_C=C, config_D_E=D_E)
    (out, in_), has_bias = W.shape, layer.base_layer.bias is not None
    A, B = (glora_path(p, name, W.shape) for name in "AB")
    D, E = (glora_path(p, name, (out,)) for name in "DE")
    moved_b = b + b * D + E + (W @ glora_path(p, "C", (in_, 1)))[:, 0]
    assert has_bias == any(f"glora_{name}" in key for name in "CDE" for key in p) or D_E == "none"
    assert np.abs(moved_b - b).max() > 0.05 or not has_bias or D_E == "none"
    if A_B == "none":
        x = sample(layer.base_layer)
        np.testing.assert_allclose(arr(layer(x)), arr(x) @ W.T + moved_b, rtol=1e-5, atol=2e-5)
    else:
        agree(layer, W + W * A + B, moved_b)


def test_glora_reads_the_pretrained_weights_under_merged_adapters():
    """So that two may be merged in either order."""
    model = attach("llama", veneer.GloraConfig(r=3, target_modules=["q_proj"]))
    model.add_adapter("two", veneer.GloraConfig(r=2, target_modules=["q_proj"]))
    models.perturb(model, "two", scale=0.3)
    model.set_adapter(["default", "two"])
    batch = models.inputs("llama")
    active = models.output(model, batch)
    for name in ("two", "default"):
        model.merge_adapter([name])
        torch.testing.assert_close(models.output(model, batch), active, rtol=1e-4, atol=1e-5)


def test_glora_scales_the_bias_that_trains_beside_it():
    model = attach("llama", veneer.GloraConfig(r=3, target_modules=["q_proj"], bias="glora_only"))
    layer = state(model).layers["model.layers.0.self_attn.q_proj"]
    glora, trained = layer.adapters["default"].parts
    p = {name: arr(v) for name, v in glora.named_parameters()}
    (W, b), trained_b = base_of(layer.base_layer), arr(trained.bias)
    W_moved = W + W * glora_path(p, "A", W.shape) + glora_path(p, "B", W.shape)
    shift = trained_b * p["glora_D.X"] + p["glora_E.X"] + (W @ glora_path(p, "C", (30, 1)))[:, 0]
    assert np.abs(trained_b - b).max() > 0.05
    agree(layer, W_moved, trained_b + shift)


def test_gloras_limits():
    with pytest.raises(TargetError, match="down_proj.* has no bias"):
        get_peft_model(models.build("llama"), veneer.GloraConfig(config_A_B="none", target_modules=["down_proj"]))
    for settings in (
        dict(r=0),
        dict(config_A_B="matrix"),
        dict(config_C="constant"),
        dict(config_D_E="lora"),
        dict(config_A_B="none", config_C="none", config_D_E="none"),
    ):
        with pytest.raises(ConfigError):
            veneer.GloraConfig(**settings)
