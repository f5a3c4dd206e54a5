"""Methods that learn from shared banks and random bases, derived again in NumPy with no code of veneer's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from veneer import CheckpointError, NotMergeable, PeftModel, TargetError, get_peft_model
from veneer.maths.joint import left_vectors
from veneer.model.to_lora import factors_of

from . import models
from .models import output
from .test_numpy import agree, arr, attach, base_of, sample, softmax, state
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
    other = pvera(generator_seed=6)
    assert not torch.equal(one.noise(torch.zeros(9)), other.get_base_model().model.layers[
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


def tinylora(r: int, W: np.ndarray, p: dict, v: np.ndarray) -> np.ndarray:
    """B (sum_i v_i P_i) A; B A is the best approximation of W of rank r, its singular values shared evenly."""
    A, B, P = p["tinylora_A"], p["tinylora_B"], p["tinylora_P"]
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    np.testing.assert_allclose(B @ A, U[:, :r] * S[:r] @ Vt[:r], atol=1e-4)
    np.testing.assert_allclose(A @ A.T, np.diag(S[:r]), atol=1e-4)
    np.testing.assert_allclose(B.T @ B, np.diag(S[:r]), atol=1e-4)
    return sum(v[i] * B @ P[i] @ A for i in range(len(v)))


@pytest.mark.parametrize(
    ("name", "tying", "groups"),
    [
        ("llama", 0.0, [0, 1, 2, 3, 4, 5]),
        ("llama", 0.4, [0, 1, 2, 3, 3, 3]),
        ("llama", 1.0, [0, 0, 0, 0, 0, 0]),
        ("gpt2", 0.4, [0, 0, 1, 1]),
    ],
)
def test_tinylora(name: str, tying: float, groups: list[int]):
    """Neighbours share a vector; a group has as many targets as divide evenly, the last takes the rest."""
    config = veneer.TinyLoraConfig(r=4, u=5, weight_tying=tying, target_modules=PLACES[name])
    for group, (layer, p, shared, W, b) in zip(groups, layers_of(name, config), strict=True):
        assert len(shared) == max(groups) + 1
        agree(layer, W + tinylora(4, W, p, shared[f"tinylora_v.{group}"]), b)


def test_tinyloras_matrices():
    """Entries of variance 1 / r, other ones for each target, the same for the same seed."""
    config = veneer.TinyLoraConfig(r=6, u=50, target_modules=PLACES["llama"])
    one, two = ([p["tinylora_P"] for _, p, *_ in layers_of("llama", config)] for _ in range(2))
    for i, P in enumerate(one):
        assert abs(P.var() * 6 - 1) < 0.1 and np.array_equal(P, two[i])
        assert not any(np.array_equal(P, other) for other in one[:i])


def test_tinylora_on_an_embedding():
    """The stored (vocabulary, width) table gains B R A; dropout falls on what was looked up."""
    settings = dict(r=3, u=5, target_modules=["wte"], tinylora_dropout=0.5)
    found = state(attach("gpt2", veneer.TinyLoraConfig(**settings), scale=1.0))
    layer, ids = found.layers["transformer.wte"], torch.tensor([[3, 66, 0], [5, 5, 41]])
    p = {name: arr(t) for name, t in layer.adapters["default"].named_buffers()}
    E, v = arr(layer.base_layer.weight), arr(found.shared["default"].tinylora_v["0"])
    update = tinylora(3, E, p, v)
    np.testing.assert_allclose(arr(layer(ids)), (E + update)[ids.numpy()], rtol=1e-5, atol=2e-5)
    assert np.abs(update).max() > 0.05
    changes = arr(layer.train()(ids)) - E[ids.numpy()]
    mixing = sum(v[i] * p["tinylora_P"][i] for i in range(5)) @ p["tinylora_A"]
    masks = changes @ np.linalg.pinv(mixing) / p["tinylora_B"][ids.numpy()]
    np.testing.assert_allclose(np.unique(masks.round(3)), [0, 2])


def test_a_tinylora_file_brings_its_directions(tmp_path, monkeypatch):
    """Loading takes no decomposition, whose signs other machines may choose otherwise."""
    config = veneer.TinyLoraConfig(target_modules=PLACES["llama"])
    attach("llama", config).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.linalg, "svd", None)
    PeftModel.from_pretrained(models.build("llama"), tmp_path)


def composed(logits: np.ndarray, bank: np.ndarray, k: int) -> np.ndarray:
    """Each stretch: a softmax over the k largest logits, mixing their vectors of the bank."""
    flat = logits.reshape(-1, logits.shape[-1])
    rows = []
    for row in flat:
        chosen = np.argsort(row)[::-1][:k]
        rows.append(softmax(row[chosen]) @ bank[chosen])
    return np.array(rows).reshape(*logits.shape[:-1], bank.shape[1])


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(("name", "length"), [("llama", 5), ("gpt2", 15)])
def test_vblora(name: str, length: int, k: int):
    """A's rows are stretches joined end to end; so are B's columns."""
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[name]
    config = veneer.VBLoRAConfig(r=3, num_vectors=9, vector_length=length, topk=k, target_modules=targets)
    for layer, p, shared, W, b in layers_of(name, config, scale=0.6):
        A, B = (composed(p[f"vblora_logits_{side}"], shared["vblora_vector_bank"], k) for side in "AB")
        assert A.shape == (3, W.shape[1] // length, length) and B.shape == (W.shape[0] // length, 3, length)
        agree(layer, W + sum(np.outer(B[:, i].ravel(), A[i].ravel()) for i in range(3)), b)


VBLORA = dict(r=3, vector_length=5, target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize(("vectors", "dtype"), [(255, torch.uint8), (256, torch.int16), (32768, torch.int32)])
def test_a_vblora_file_of_choices_is_small_and_final(vectors: int, dtype: torch.dtype, tmp_path):
    config = veneer.VBLoRAConfig(**VBLORA, num_vectors=vectors, save_only_topk_weights=True)
    model, batch = attach("llama", config), models.inputs("llama")
    model.save_pretrained(tmp_path / "one")
    found = {key: t for key, t in load_file(tmp_path / "one" / "adapter_model.safetensors").items() if "logits" in key}
    assert {t.dtype for key, t in found.items() if key.endswith("_indices")} == {dtype}
    stretches = 2 * 3 * (30 + 70 + 45 + 30) // 5
    assert sum(t.numel() for t in found.values()) == 3 * stretches
    (tmp_path / "one" / "adapter_training.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is_trainable=False"):
        PeftModel.from_pretrained(models.build("llama"), tmp_path / "one", is_trainable=True)
    loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path / "one")
    assert torch.equal(output(loaded, batch), output(model, batch))
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "two")
    assert not torch.equal(output(loaded.merge_and_unload(), batch), output(models.build("llama"), batch))


def test_vbloras_length_divides_its_targets():
    with pytest.raises(TargetError, match="vector_length 4 on 'model.layers.0.self_attn.q_proj' must divide in = 30"):
        attach("llama", veneer.VBLoRAConfig(vector_length=4, target_modules=["q_proj"]))


@models_of_both_kinds
@pytest.mark.parametrize("d", [23, 3000])
def test_unilora(name: str, d: int):
    """All entries of all A and B, flat, are P theta; P has one entry a row, orthonormal columns, balanced counts."""
    found = list(layers_of(name, veneer.UniLoraConfig(r=3, theta_d_length=d, target_modules=PLACES[name]), scale=3.0))
    places = np.concatenate([p[f"unilora_indices_{side}"].ravel() for _, p, *_ in found for side in "AB"])
    counts = np.bincount(places, minlength=d)
    assert counts.max() - counts.min() <= 1 and counts.sum() == len(places)
    P = np.zeros((len(places), d))
    P[np.arange(len(places)), places] = 1
    P /= np.maximum(np.linalg.norm(P, axis=0), 1)
    entries, at = P @ found[0][2]["unilora_theta_d"], 0
    for layer, _, _, W, b in found:
        A = entries[at : (at := at + 3 * W.shape[1])].reshape(3, -1)
        B = entries[at : (at := at + 3 * W.shape[0])].reshape(-1, 3)
        agree(layer, W + B @ A, b)
    assert at == len(entries)


def test_uniloras_file_is_its_vector(tmp_path):
    attach("llama", veneer.UniLoraConfig(target_modules=PLACES["llama"])).save_pretrained(tmp_path)
    ((key, theta),) = load_file(tmp_path / "adapter_model.safetensors").items()
    assert key == "base_model.unilora_theta_d" and theta.shape == (256,)


def test_a_unilora_file_with_places_needs_no_seed(tmp_path):
    """What the file says goes before what the seed would give."""
    batch = models.inputs("llama")
    config = veneer.UniLoraConfig(theta_d_length=40, target_modules=PLACES["llama"], save_indices=True)
    model = attach("llama", config)
    for layer in state(model).layers.values():
        for places in layer.adapters["default"].buffers():
            places.copy_(places.flatten().flip(0).view_as(places))
    state(model).shared["default"].scale.mul_(3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path)
    assert torch.equal(output(loaded, batch), output(model, batch))


def test_unilora_learns_in_half_precision_too():
    model = get_peft_model(
        models.build("llama", dtype=torch.bfloat16),
        veneer.UniLoraConfig(target_modules=PLACES["llama"]),
        autocast_adapter_dtype=False,
    )
    assert state(model).shared["default"].unilora_theta_d.dtype == torch.bfloat16
    output(model, models.inputs("llama")).float().square().mean().backward()


@pytest.mark.parametrize("stride", [1, 2])
@models_of_both_kinds
def test_lily(name: str, stride: int):
    """W x + s h sum_e p_e B_e; targets of one name share the experts, `stride` in a row of them A."""
    config = veneer.LilyConfig(r=3, num_B=4, stride_A=stride, scaling=1.5, target_modules=PLACES[name])
    layers = state(attach(name, config)).layers
    for path, layer in layers.items():
        same = [other for other in layers if other.endswith(path.rpartition(".")[2])]
        owner = layers[same[same.index(path) // stride * stride]].adapters["default"]
        A, R = arr(owner.lily_A.weight), arr(layer.adapters["default"].lily_router.weight)
        B = arr(layers[same[0]].adapters["default"].lily_B.weight).reshape(4, 3, -1)
        x = sample(layer.base_layer)
        W, b = base_of(layer.base_layer)
        h = arr(x) @ A.T
        p = softmax(h @ R.T).mean((0, 1))
        expected = arr(x) @ W.T + b + 1.5 * sum(p[e] * h @ B[e] for e in range(4))
        np.testing.assert_allclose(arr(layer(x)), expected, rtol=1e-5, atol=3e-5)
    with pytest.raises(NotMergeable):
        layer.fold(layer.stack(("default",)))


def lily(directory, **settings):
    settings = dict(r=3, stride_A=2, target_modules=PLACES["llama"]) | settings
    model = attach("llama", veneer.LilyConfig(**settings))
    model.save_pretrained(directory)
    return model, load_file(directory / "adapter_model.safetensors")


def test_lilys_file_holds_each_number_once(tmp_path):
    model, found = lily(tmp_path)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(t.numel() for t in found.values()) == sum(p.numel() for p in trained)
    assert sorted(key.split(".")[4] for key in found if "lily_A" in key) == ["0", "0", "0"]


def test_lilys_file_may_repeat_what_is_shared_but_not_change_it(tmp_path):
    model, found = lily(tmp_path)
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lily_A.weight"
    for change in (0.0, 0.1):
        found[key.format(1)] = found[key.format(0)] + change
        save_file(found, tmp_path / "adapter_model.safetensors")
        if change:
            problem = r"1 different from the tensors they must repeat:\s.*layers.1.*q_proj.lily_A"
            with pytest.raises(CheckpointError, match=problem):
                PeftModel.from_pretrained(models.build("llama"), tmp_path)
        else:
            loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path)
            assert torch.equal(output(loaded, models.inputs("llama")), output(model, models.inputs("llama")))
    del found[key.format(0)]
    save_file(found, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="1 missing"):
        PeftModel.from_pretrained(models.build("llama"), tmp_path)


def test_lily_on_all_linear_shares_by_name(tmp_path):
    model, found = lily(tmp_path, target_modules="all-linear")
    assert len([key for key in found if "lily_B" in key]) == 7
    names = veneer.LilyConfig.from_pretrained(tmp_path).target_modules
    assert names == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path)
    assert torch.equal(output(loaded, models.inputs("llama")), output(model, models.inputs("llama")))


def test_lily_groups_by_the_longest_entry_and_by_shape():
    config = veneer.LilyConfig(r=3, target_modules=["q_proj", "0.self_attn.q_proj", "k_proj"])
    layers = state(attach("llama", config)).layers
    assert all(hasattr(layer.adapters["default"], "lily_B") for path, layer in layers.items() if "q_proj" in path)
    layers = state(attach("llama", veneer.LilyConfig(r=3, target_modules=".*[qk]_proj"))).layers
    owners = [path for path, layer in layers.items() if hasattr(layer.adapters["default"], "lily_B")]
    assert owners == [f"model.layers.0.self_attn.{name}_proj" for name in "qk"]


def frod_of(p: dict, shared: dict, W: np.ndarray, name: str) -> np.ndarray:
    """U (diag(l) + S) V^T, where W = U diag(s) V^T with columns of length one in U."""
    V, places = shared[f"frod_V.{name}"], shared[f"frod_s_indices.{name}"].astype(int)
    U = W @ np.linalg.inv(V).T
    middle = np.diag(p["frod_lambda_l"])
    for (row, column), value in zip(places.T, p["frod_lambda_s_values"], strict=True):
        assert row != column and middle[row, column] == 0
        middle[row, column] = value
    return U / np.linalg.norm(U, axis=0) @ middle @ V.T


CATEGORIES = {"q_proj": "self_attn_q_proj", "k_proj": "self_attn_k_proj", "down_proj": "mlp_down_proj"}
CATEGORIES |= {"c_attn": "attn_c_attn", "c_proj": "mlp_c_proj"}


@models_of_both_kinds
def test_frod(name: str):
    config = veneer.FrodConfig(sparse_rate=0.2, target_modules=PLACES[name])
    for layer, p, shared, W, b in layers_of(name, config):
        n, category = W.shape[1], CATEGORIES[layer.path.rpartition(".")[2]]
        assert len(p["frod_lambda_s_values"]) == int(0.2 * n * n)
        assert shared[f"frod_s_size.{category}"].tolist() == [n, n]
        agree(layer, frod_of(p, shared, W, category), b)


def test_frods_basis_decomposes_all_layers():
    """V V^T = sum_i W_i^T W_i, and E makes the mean of (Q_i^T Q_i + ridge)^-1 diagonal; of few rows, orthogonal."""
    config = veneer.FrodConfig(target_modules=PLACES["llama"], regularization_alpha=0.3)
    found = list(layers_of("llama", config, scale=0.0))
    for end, name in list(CATEGORIES.items())[:3]:
        weights = [W for layer, _, _, W, _ in found if layer.path.endswith(end)]
        V = found[0][2][f"frod_V.{name}"]
        if end == "k_proj":
            np.testing.assert_allclose(V.T @ V, np.eye(30), atol=1e-5)
            continue
        total = sum(W.T @ W for W in weights)
        np.testing.assert_allclose(V @ V.T, total, rtol=1e-4, atol=1e-4)
        R = np.linalg.cholesky(total).T
        E = np.linalg.inv(R).T @ V
        Q = [W @ np.linalg.inv(R) for W in weights]
        D = E.T @ sum(np.linalg.inv(q.T @ q + 0.3 * np.eye(len(total))) for q in Q) @ E
        np.testing.assert_allclose(D, np.diag(np.diag(D)), atol=1e-3)


def test_frod_starts_exactly_as_the_base():
    batch = models.inputs("llama")
    model = get_peft_model(models.build("llama"), veneer.FrodConfig(target_modules=PLACES["llama"])).eval()
    assert torch.equal(output(model, batch), output(models.build("llama"), batch))


@pytest.mark.parametrize("resume", [False, True])
def test_frod_takes_the_basis_of_its_file(resume: bool, tmp_path):
    """Another machine may have found other eigenvectors: U follows from the V that is in the file."""
    config = veneer.FrodConfig(sparse_rate=0.2, target_modules=["q_proj"])
    attach("llama", config).save_pretrained(tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    V = found["base_model.frod_V.self_attn_q_proj"]
    V.copy_(V.flip(1) * torch.linspace(-1, 2, 30))
    save_file(found, tmp_path / "adapter_model.safetensors")
    if resume:
        model = get_peft_model(models.build("llama"), config).eval()
        model.load_adapter(tmp_path, "default", is_trainable=True)
    else:
        model = PeftModel.from_pretrained(models.build("llama"), tmp_path)
    shared = {name: arr(t) for name, t in state(model).shared["default"].named_buffers()}
    np.testing.assert_array_equal(shared["frod_V.self_attn_q_proj"], arr(V))
    for layer in state(model).layers.values():
        p = {name: arr(t) for name, t in layer.adapters["default"].named_parameters()}
        W, b = base_of(layer.base_layer)
        agree(layer, frod_of(p, shared, W, "self_attn_q_proj"), b)


def test_a_frod_file_with_its_basis_is_not_decomposed_again(tmp_path, monkeypatch):
    attach("llama", veneer.FrodConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.linalg, "qr", None)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    PeftModel.from_pretrained(models.build("llama"), tmp_path)


def test_frods_file_without_basis_is_what_is_trained(tmp_path):
    model = attach("llama", veneer.FrodConfig(target_modules=PLACES["llama"], save_projection=False))
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in found.values()) == model.get_nb_trainable_parameters()[0]


def test_left_vectors_of_a_singular_basis():
    """Directions the basis lacks, or that W does not use, have no vector; the rest still gives W."""
    V = torch.eye(5)
    V[4, 4] = 0
    W = torch.arange(20.0).view(4, 5) + 1
    W[:, 4] = W[:, 2] = 0
    U, s = left_vectors(W, V)
    np.testing.assert_allclose(arr(U) * arr(s) @ arr(V).T, arr(W), atol=1e-5)
    assert s[2] == s[4] == 0 and not U[:, [2, 4]].any()


@pytest.mark.parametrize("method", ["Pvera", "TinyLora", "VBLoRA", "UniLora"])
def test_banks_are_low_rank_to_the_tools(method: str):
    """Conversion to a plain LoRA takes their factors as they are."""
    more = dict(vector_length=5, num_vectors=9) if method == "VBLoRA" else {}
    config = getattr(veneer, f"{method}Config")(r=3, target_modules=["q_proj", "down_proj"], **more)
    for layer in state(attach("llama", config)).layers.values():
        A, B = factors_of(layer, "default")
        assert A.shape[0] == B.shape[1] == 3
        np.testing.assert_allclose(arr(B @ A), arr(layer.adapters["default"].delta()), atol=1e-6)


@pytest.mark.parametrize("place", [-1, 40])
@pytest.mark.parametrize("method", ["VBLoRA", "UniLora"])
def test_places_outside_a_bank_are_refused(method: str, place: int, tmp_path):
    more = dict(num_vectors=40, vector_length=5, save_only_topk_weights=True)
    more = more if method == "VBLoRA" else dict(theta_d_length=40, save_indices=True)
    config = getattr(veneer, f"{method}Config")(target_modules=["q_proj", "down_proj"], **more)
    attach("llama", config).save_pretrained(tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in found if "indices" in key)
    found[key] = found[key].long()
    found[key].view(-1)[0] = place
    save_file(found, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="points outside the"):
        PeftModel.from_pretrained(models.build("llama"), tmp_path)
