"""Methods that learn few entries, few biases or a mixture for each task, against their formulas derived in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from veneer import AdamssConfig, CheckpointError, ConfigError, PeftModel, TargetError, VeneerError, get_peft_model
from veneer.maths.kmeans import kmeans

from . import models
from .cases import CASES
from .models import output
from .test_numpy import PLACES, adapt, agree, arr, attach, base_of, linear_places, places, sample, state, watching


@places
def test_shira(place: str):
    """W with the learned values added at the file's rows and columns, one entry after the other."""
    layer, p, W, b = adapt(veneer.ShiraConfig, place, r=2, random_seed=3)
    rows, columns = layer.adapters["default"].shira_indices.numpy()
    assert len(rows) == 2 * sum(W.shape) == len(set(zip(rows, columns, strict=True)))
    for value, row, column in zip(p["shira_weight"], rows, columns, strict=True):
        W[row, column] += value
    agree(layer, W, b)


def test_shira_on_one_row_never_forms_the_matrix(monkeypatch):
    layer, *_ = adapt(veneer.ShiraConfig, "linear", r=2)
    x = sample(layer.base_layer)[:1, :1]
    dense = layer.base_layer(x) + x @ layer.adapters["default"].delta().T
    monkeypatch.setattr("veneer.methods.shira.scatter", None)
    torch.testing.assert_close(layer(x), dense)


def random_mask(module, r: int) -> torch.Tensor:
    """The last r (in + out) entries of the weight."""
    mask = torch.zeros(module.weight.numel())
    mask[-r * sum(module.weight.shape) :] = 1
    return mask.view_as(module.weight)


def test_shira_with_a_mask_of_its_own(tmp_path):
    """The mask comes back from the file, without the function."""
    config = veneer.ShiraConfig(r=2, mask_type="last", target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"set config\.mask_fn"):
        get_peft_model(models.build("llama"), config)
    config.mask_fn = random_mask
    model = models.perturb(get_peft_model(models.build("llama"), config).eval())
    layer = next(iter(state(model).layers.values()))
    delta = arr(layer.adapters["default"].delta()).flatten()
    assert (delta != 0).sum() == 200 and (delta[-200:] != 0).all()
    model.save_pretrained(tmp_path)
    batch = models.inputs("llama")
    loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path)
    assert torch.equal(output(loaded, batch), output(model, batch))
    config.mask_fn = lambda module, r: torch.ones_like(module.weight)
    with pytest.raises(ConfigError, match="with 2100 ones"):
        get_peft_model(models.build("llama"), config)


def test_shira_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"asks for 2200 entries, its weight has 2100"):
        get_peft_model(models.build("llama"), veneer.ShiraConfig(r=22, target_modules=["q_proj"]))
    model = get_peft_model(models.build("llama"), veneer.ShiraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(t for key, t in tensors.items() if key.endswith("shira_indices"))[0, 0] = 70
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="lie outside its weight"):
        PeftModel.from_pretrained(models.build("llama"), tmp_path)


def test_shira_draws_pefts_mask():
    """Seeded or not, so that training can go over from one library to the other by the config alone."""
    peft = pytest.importorskip("peft")
    for seed in (None, 5):
        settings = dict(r=3, target_modules=["q_proj"], random_seed=seed)
        ours = get_peft_model(models.build("llama"), veneer.ShiraConfig(**settings))
        theirs = peft.get_peft_model(models.build("llama"), peft.ShiraConfig(**settings))
        mine = state(ours).layers["model.layers.0.self_attn.q_proj"].adapters["default"].shira_indices
        layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
        assert np.array_equal(mine.numpy(), layer.shira_indices["default"].numpy())


@places
@pytest.mark.parametrize("top", [True, False])
def test_supertuning(place: str, top: bool):
    """The learned values stand at the largest (or smallest) |W|; Supra adds alpha / r B A."""
    layer, p, W, b = adapt(veneer.SupertuningConfig, place, sparsity=0.75, select_top=top, r=3, lora_alpha=5)
    order = np.argsort(np.abs(W), axis=None)
    chosen = order[-len(p["supertuning_values"]) :] if top else order[: len(p["supertuning_values"])]
    assert len(chosen) == W.size // 4
    indices = layer.adapters["default"].supertuning_indices.numpy()
    assert set(indices) == set(chosen)
    A, B = (p[f"supertuning_lora_{m}"].reshape(len(p[f"supertuning_lora_{m}"]), -1) for m in "AB")
    S = np.zeros_like(W)
    for index, value in zip(indices, p["supertuning_values"], strict=True):
        S.flat[index] = value
    agree(layer, W + S + 5 / 3 * (B @ A), b)


def test_supertuning_on_one_row_never_forms_the_matrix(monkeypatch):
    layer, *_ = adapt(veneer.SupertuningConfig, "linear")
    x = sample(layer.base_layer)[:1, :1]
    dense = layer.base_layer(x) + x @ layer.adapters["default"].delta().T
    monkeypatch.setattr("veneer.methods.supertuning.scatter", None)
    torch.testing.assert_close(layer(x), dense)


def test_supertunings_file_without_places_is_small(tmp_path):
    sizes = []
    for saved in (True, False):
        config = veneer.SupertuningConfig(sparsity=0.5, save_precomputed_indices=saved, target_modules=["q_proj"])
        model = models.perturb(get_peft_model(models.build("llama"), config).eval())
        model.save_pretrained(tmp_path / str(saved))
        sizes.append(sum(t.nbytes for t in load_file(tmp_path / str(saved) / "adapter_model.safetensors").values()))
    assert sizes[0] == 2 * sizes[1] == 2 * 4 * 2 * 1050
    file = tmp_path / "True" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(t for key, t in tensors.items() if key.endswith("indices"))[3] = -1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="lie outside its weight"):
        PeftModel.from_pretrained(models.build("llama"), tmp_path / "True")


def test_supras_dropout_falls_on_the_low_rank_part():
    layer, *_ = adapt(veneer.SupertuningConfig, "linear", r=3, lora_dropout=0.5)
    adapter, x = layer.adapters["default"], sample(layer.base_layer)
    y = layer.base_layer(x) + x @ adapter.sparse().T
    torch.manual_seed(1)
    noisy = layer.train()(x)
    torch.manual_seed(1)
    A, B = adapter.pair()
    torch.testing.assert_close(noisy, y + torch.nn.functional.dropout(x, 0.5) @ A.T @ B.T)


def test_supertuning_refuses_what_learns_nothing():
    with pytest.raises(ConfigError, match="leaves none of its 2100 entries"):
        get_peft_model(models.build("llama"), veneer.SupertuningConfig(sparsity=0.9999, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="needs its rank r"):
        veneer.SupertuningConfig(lora_alpha=3)


def task_case(config_class, place: str, **settings):
    """A model with its one adapted layer, the layer's parameters and W, b."""
    name, path = PLACES[place]
    model = attach(name, config_class(target_modules=[path], **settings))
    layer = state(model).layers[path]
    values = {n: arr(p) for n, p in layer.adapters["default"].named_parameters()}
    return model, layer, values, *base_of(layer.base_layer)


def check_rows(model, layer, W, b, tasks: list[int], delta) -> None:
    """Each row of the layer's output is that of W plus the delta of its task; the tasks are a list or a tensor."""
    ids = torch.randint(3, 67, (len(tasks), 7), generator=torch.Generator().manual_seed(4))
    for given in (tasks, torch.tensor(tasks)):
        with watching(layer) as seen, torch.no_grad():
            model(input_ids=ids, task_ids=given)
        x, y = seen[-1]
        for row, task in enumerate(tasks):
            assert np.abs(delta(task)).max() > 0.05
            np.testing.assert_allclose(y[row], x[row] @ (W + delta(task)).T + b, rtol=1e-5, atol=1e-4)


@linear_places
@pytest.mark.parametrize("splits", [1, 5])
def test_poly(place: str, splits: int):
    """Each part of input and output has its own mixture of the skills; the output's parts stand one after another."""
    model, layer, p, W, b = task_case(veneer.PolyConfig, place, r=3, n_tasks=4, n_skills=2, n_splits=splits)

    def delta(task: int) -> np.ndarray:
        A, B = p["poly_lora_A"], p["poly_lora_B"]
        z = 1 / (1 + np.exp(-p["poly_router.module_logits"][task].reshape(splits, 2)))
        w = z / z.sum(1, keepdims=True)
        mixed_A = np.concatenate([sum(w[q, s] * A[q, s] for s in range(2)) for q in range(splits)])  # (in, r)
        mixed_B = np.concatenate([sum(w[q, s] * B[q, s] for s in range(2)) for q in range(splits)], axis=1)  # (r, out)
        return (mixed_A @ mixed_B).T / 3

    check_rows(model, layer, W, b, [3, 0, 3, 1], delta)


def test_polys_weights_are_drawn_in_training():
    """Relaxed Bernoulli: the logit of a sample is Z plus logistic noise, whose spread is pi / sqrt 3."""
    _, layer, p, *_ = task_case(veneer.PolyConfig, "linear", n_skills=2)
    adapter = layer.adapters["default"].train()
    drawn = adapter.weights(torch.zeros(20000, dtype=torch.long))[:, 0]
    assert torch.allclose(drawn.sum(-1), torch.ones(20000))
    ratio = arr((drawn[:, 0] / drawn[:, 1]).log())
    z = p["poly_router.module_logits"][0] + np.random.default_rng(0).logistic(size=(20000, 2))
    log_sigmoid = -np.log1p(np.exp(-z))
    expected = log_sigmoid[:, 0] - log_sigmoid[:, 1]
    assert abs(ratio.mean() - expected.mean()) < 0.05 and abs(ratio.std() - expected.std()) < 0.05
    assert torch.equal(*(adapter.eval().weights(torch.zeros(1, dtype=torch.long)) for _ in range(2)))


@linear_places
def test_mtl_lora(place: str):
    """W plus alpha / r (sum_i w_ti B_i) Lambda_t A, the w of a task from a softmax with a temperature."""
    settings = dict(r=3, lora_alpha=5, n_tasks=4, n_up_projections=2, temperature=0.7)
    model, layer, p, W, b = task_case(veneer.MTLLoraConfig, place, **settings)

    def delta(task: int) -> np.ndarray:
        w = np.exp(p["mtl_lora_mixture"][task] / 0.7) / np.exp(p["mtl_lora_mixture"][task] / 0.7).sum()
        mixed = w[0] * p["mtl_lora_B"][0] + w[1] * p["mtl_lora_B"][1]
        return 5 / 3 * mixed @ p["mtl_lora_lambda"][task] @ p["mtl_lora_A.weight"]

    check_rows(model, layer, W, b, [3, 0, 3, 1], delta)


def test_the_up_projections_do_not_stay_alike():
    """They start at zero, so only unequal mixtures can tell them apart."""
    model = get_peft_model(models.build("llama"), veneer.MTLLoraConfig(n_tasks=2, target_modules=["q_proj"])).train()
    ids = models.inputs("llama")["input_ids"]
    model(input_ids=ids, labels=ids, task_ids=[0, 1, 0]).loss.backward()
    grad = next(p.grad for n, p in model.named_parameters() if n.endswith("mtl_lora_B"))
    assert (grad[0] - grad[1]).abs().max() > 0.1 * grad.abs().max() > 0


TASKED = [c for c in CASES if c.method in ("poly", "mtl_lora") and c.model == "llama"]


@pytest.mark.parametrize("case", TASKED, ids=str)
def test_tasks_must_be_known(case):
    model, ids = case.build(), models.inputs("llama")["input_ids"]
    tasks = case.config().n_tasks
    for given, words in (
        ({}, "give the call .* task_ids"),
        ({"task_ids": [0, 1, tasks]}, f"between 0 and n_tasks - 1 = {tasks - 1}"),
        ({"task_ids": [0, 1, -1]}, "between 0 and"),
        ({"task_ids": torch.tensor(1)}, "a whole number for each row"),
        ({"task_ids": [0.0, 1.0, 0.0]}, "a whole number for each row"),
        ({"task_ids": [0, 1]}, "2 entries for a batch of 3 rows"),
    ):
        with pytest.raises(VeneerError, match=words):
            model(input_ids=ids, **given)
    with pytest.raises(VeneerError, match="task_ids has 3 entries"):
        layer = next(iter(state(model).layers.values()))
        model(input_ids=ids, task_ids=[0, 1, 0])
        layer(torch.randn(2, 5, 30))
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, output(models.build("llama"), {"input_ids": ids}))


@pytest.mark.parametrize("case", TASKED, ids=str)
def test_beams_keep_the_task_of_their_row(case):
    model, ids = case.build(), models.inputs("llama")["input_ids"]
    settings = dict(num_beams=3, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    together = model.generate(input_ids=ids, task_ids=[1, 0, 1], **settings)
    for row, task in enumerate([1, 0, 1]):
        alone = model.generate(input_ids=ids[row : row + 1], task_ids=[task], **settings)
        assert torch.equal(together[row : row + 1], alone)


def test_polys_splits_must_divide_the_sizes():
    with pytest.raises(veneer.TargetError, match=r"n_splits = 4 .* \(30, 70\)"):
        get_peft_model(models.build("llama"), veneer.PolyConfig(n_splits=4, target_modules=["q_proj"]))


@places
def test_bitfit(place: str):
    """The same weight, the learned bias; where there is none, it says so."""
    if place in ("narrowing", "conv"):
        with pytest.raises(TargetError, match="has no bias to train"):
            adapt(veneer.BitFitConfig, place)
        return
    layer, p, W, b = adapt(veneer.BitFitConfig, place)
    x = sample(layer.base_layer)
    with torch.no_grad():
        np.testing.assert_allclose(arr(layer(x)), arr(x) @ W.T + p["bias"], rtol=1e-5, atol=2e-5)
    assert np.abs(p["bias"] - b).max() > 0.3


def test_bitfit_on_a_norm():
    model = attach("gpt2", veneer.BitFitConfig(target_modules=["ln_1"]))
    layer = state(model).layers["transformer.h.1.ln_1"]
    x = torch.randn(2, 5, 30)
    z = arr(x) - arr(x).mean(-1, keepdims=True)
    z = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5) * arr(layer.weight) + arr(layer.adapters["default"].bias)
    np.testing.assert_allclose(arr(layer(x)), z, rtol=1e-4, atol=1e-5)


def test_bitfit_trains_every_bias_and_the_head():
    """What training changes is what the unadapted model calls bias, and the head of the task."""
    model = get_peft_model(models.bert(), veneer.BitFitConfig(task_type="SEQ_CLS"))
    biases = {n for n, _ in models.bert().named_parameters() if n.endswith(".bias") and not n.startswith("classifier")}
    assert {f"{path}.bias" for path in state(model).adapters("default") if path != "classifier"} == biases
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(biases) + 2 and sum("classifier" in n for n in trained) == 2


def test_bitfit_without_biases_says_so():
    with pytest.raises(TargetError, match="no module with a bias"):
        get_peft_model(models.build("t5"), veneer.BitFitConfig())
    with pytest.raises(ConfigError, match="has no place beside it"):
        veneer.BitFitConfig(bias="all")


def main_directions(W: np.ndarray, r: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """U and V^T by Halko's algorithm with two power iterations, from torch's normal values of a seed."""
    tall = W if len(W) >= W.shape[1] else W.T
    start = torch.randn(tall.shape[1], r, generator=torch.Generator().manual_seed(seed))
    Q = np.linalg.qr(tall @ arr(start))[0]
    for _ in range(2):
        Q = np.linalg.qr(tall @ np.linalg.qr(tall.T @ Q)[0])[0]
    u, _, vt = np.linalg.svd(Q.T @ tall, full_matrices=False)
    return (Q @ u, vt) if tall is W else (vt.T, (Q @ u).T)


def lloyd(X: np.ndarray, k: int) -> np.ndarray:
    """Ten steps of k-means from the rows that scikit-learn's seed chooses."""
    chosen = np.random.RandomState(123456789).choice(len(X), k, replace=False, p=np.full(len(X), 1 / len(X)))
    centres = X[chosen]
    for _ in range(10):
        labels = ((X[:, None] - centres) ** 2).sum(-1).argmin(1)
        centres = np.stack([X[labels == j].mean(0) for j in range(k)])
    return ((X[:, None] - centres) ** 2).sum(-1).argmin(1)


@linear_places
def test_adamss(place: str):
    """The rows of W in cluster k of U's rows get B_k A_k V; a last column, for the bias, goes with them."""
    layer, p, W, b = adapt(AdamssConfig, place, r=5, num_subspaces=3, subspace_rank=2, random_seed=4)
    biased = layer.base_layer.bias is not None
    whole = np.hstack([W, b[:, None]]) if biased else W
    U, V = main_directions(whole, 5, seed=4)
    signs = np.sign((arr(layer.adapters["default"].adamss_newB) * V).sum(1, keepdims=True))
    np.testing.assert_allclose(arr(layer.adapters["default"].adamss_newB), V * signs, atol=1e-4)
    clusters, delta = lloyd(U, 3), np.zeros_like(whole)
    for k in range(3):
        delta[clusters == k] = p[f"adamss_B.{k}"] @ p[f"adamss_A.{k}"] @ (V * signs)
    agree(layer, W + delta[:, : W.shape[1]], b + delta[:, -1] if biased else b)


def test_adamss_starts_at_the_clusters_main_directions():
    layer, p, W, b = adapt(AdamssConfig, "linear", 0.0, r=7, num_subspaces=3, subspace_rank=2)
    U, V = main_directions(np.hstack([W, b[:, None]]), 7, seed=0)
    clusters = lloyd(U, 3)
    for k in range(3):
        rows = W[clusters == k] @ V[:, :-1].T  # any basis of the cluster's row space in V's coordinates
        assert rows.shape == (len(p[f"adamss_B.{k}"]), 7) and not p[f"adamss_B.{k}"].any()
        top = np.linalg.svd(U[clusters == k], full_matrices=False)[2][:2]
        A = p[f"adamss_A.{k}"] * np.sign((arr(layer.adapters["default"].adamss_newB) * V).sum(1))
        np.testing.assert_allclose(A.T @ A, top.T @ top, atol=1e-3)


def test_kmeans_is_scikit_learns():
    """Labels that scikit-learn 1.9.1 gave, so that PEFT's clusters are found again without it."""
    for n, r, k, labels in (
        (60, 7, 4, "002202310313103221323103231021201013232021323022110333130130"),
        (45, 3, 6, "235532211025212255512520140222223535442253021"),
    ):
        X = np.random.RandomState(n).normal(size=(n, r)).astype("float32")
        assert "".join(map(str, kmeans(X, k, 10))) == labels
    copies = np.repeat(np.eye(4, dtype="float32"), 5, axis=0)
    assert len({tuple(kmeans(copies, 4, 10)[i : i + 5]) for i in (0, 5, 10, 15)}) == 4


def test_adamss_needs_fewer_directions_than_rows():
    with pytest.raises(ConfigError, match=r"r = 100 .* must be below its out = 14"):
        get_peft_model(models.build("llama"), AdamssConfig(target_modules=["k_proj"]))


def test_adamss_freezes_the_least_important_subspaces():
    """By hand: averages of |p g| and of its spread since the last choice, the product's mean, A's and B's together."""
    settings = dict(use_asa=True, asa_target_subspaces=5, init_warmup=2, final_warmup=9, mask_interval=3)
    config = AdamssConfig(r=6, num_subspaces=4, target_modules=["q_proj", "down_proj"], **settings)
    model = get_peft_model(models.build("llama"), config).train()
    pairs = {
        (path, k): [a.adamss_A[k], a.adamss_B[k]]
        for path, a in state(model).adapters("default").items()
        for k in range(4)
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
    mean, spread, alive, counts = {}, {}, set(pairs), []
    for n in range(1, 13):
        ids = torch.randint(3, 67, (2, 7), generator=torch.Generator().manual_seed(n))
        before = {key: [arr(p).copy() for p in pair] for key, pair in pairs.items()}
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        for key, pair in pairs.items():
            moved = any((arr(p) != old).any() for p, old in zip(pair, before[key], strict=True))
            assert moved == (key in alive), (n, key)
        for key in alive if 2 <= n <= 9 else ():
            for i, p in enumerate(pairs[key]):
                now = np.abs(arr(p) * arr(p.grad))
                old = mean.get((key, i), 0 * now)
                spread[key, i] = 0.85 * spread.get((key, i), 0 * now) + 0.15 * np.abs(now - old)
                mean[key, i] = 0.85 * old + 0.15 * now
        if n in (3, 6, 9):
            budget = int(5 + (16 - 5) * (1 - (n - 2) / 7) ** 3)
            score = {key: sum((mean[key, i] * spread[key, i]).mean() for i in (0, 1)) for key in alive}
            alive = set(sorted(score, key=score.get)[-budget:])
            mean, spread = {}, {}
            counts.append(len(alive))
    assert counts == [11, 5, 5]
