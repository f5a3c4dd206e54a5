"""Weighted sums of adapters, and adapters as plain LoRAs, checked on outputs and on weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import veneer
from veneer import LoraConfig, NotMergeable, PeftModel, VeneerError, get_peft_model
from veneer.core.state import state_of
from veneer.maths.low_rank import compress, truncate

from . import models
from .cases import MERGEABLE, ONE_EACH, Case
from .models import output, perturb

TOLERANCE = dict(rtol=2e-4, atol=2e-5)
TARGETS = ["q_proj", "down_proj"]


def deltas(model: PeftModel, name: str) -> dict[str, np.ndarray]:
    """What an adapter changes in each weight, by merging it."""
    model.set_adapter(name)
    layers = {path: layer for path, layer in state_of(model.get_base_model()).layers.items() if name in layer.adapters}
    before = {path: layer.target.weight().clone() for path, layer in layers.items()}
    model.merge_adapter()
    found = {path: (layer.target.weight() - before[path]).detach().numpy() for path, layer in layers.items()}
    model.unmerge_adapter()
    return found


def three(**settings) -> PeftModel:
    """LoRA of rank 4 and 3 (on other modules, with another scaling), and DoRA."""
    model = get_peft_model(models.build("llama"), LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS), "one").eval()
    model.add_adapter("two", LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "k_proj"]))
    model.add_adapter("dora", LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    for seed, name in enumerate(("one", "two", "dora")):
        perturb(model, name, seed + 3)
    return model


def expected(model: PeftModel, weights: dict[str, float]) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        for path, D in deltas(model, name).items():
            total[path] = total.get(path, 0) + weight * D
    return total


def test_concatenation_is_the_exact_sum_also_with_negative_weights():
    model = three()
    model.add_weighted_adapter(["one", "two"], [1.5, -0.7], "sum", "cat")
    wanted, found = expected(model, {"one": 1.5, "two": -0.7}), deltas(model, "sum")
    assert wanted.keys() == found.keys()
    for path in wanted:
        np.testing.assert_allclose(found[path], wanted[path], atol=2e-6)


@pytest.mark.parametrize("kind", ["svd", "linear"])
@pytest.mark.parametrize("names", [("one", "two"), ("one", "dora"), ("dora",)], ids="+".join)
def test_the_sum_is_the_best_of_its_rank(kind: str, names: tuple[str, ...]):
    """By Eckart and Young the error is the tail of the singular values of the true sum."""
    model, weights = three(), [1.0, -0.5][: len(names)]
    model.add_weighted_adapter(list(names), weights, "sum", kind, svd_rank=3)
    wanted, found = expected(model, dict(zip(names, weights, strict=True))), deltas(model, "sum")
    assert model.peft_config["sum"].r == 3
    for path, D in wanted.items():
        tail = np.linalg.svd(D, compute_uv=False)[3:]
        assert np.linalg.matrix_rank(found[path], tol=1e-4) <= 3
        np.testing.assert_allclose(np.linalg.norm(found[path] - D), np.linalg.norm(tail), rtol=1e-2, atol=1e-5)


def test_the_sum_is_made_without_a_dense_matrix(monkeypatch):
    """LoRA adapters of any size: nothing of the weight's shape is formed."""
    model = three()
    monkeypatch.setattr("veneer.core.adapter.LowRank.delta", lambda self: pytest.fail("a dense update was formed"))
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", "svd", svd_rank=2)


def test_the_sum_saves_and_loads(tmp_path):
    model, batch = three(), models.inputs("llama")
    model.add_weighted_adapter(["one", "two", "dora"], [1.0, 2.0, -1.0], "sum", svd_rank=5)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(models.build("llama"), tmp_path / "sum")
    assert torch.equal(output(again, batch), output(model, batch))
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(models.build("llama"), tmp_path / "sum").eval()
    torch.testing.assert_close(output(theirs, batch), output(model, batch), **TOLERANCE)


def test_one_adapter_with_weight_one_is_itself():
    model, batch = three(), models.inputs("llama")
    model.set_adapter("one")
    alone = output(model, batch)
    for kind in ("cat", "linear", "svd"):
        model.add_weighted_adapter(["one"], [1.0], kind, kind)
        model.set_adapter(kind)
        torch.testing.assert_close(output(model, batch), alone, **TOLERANCE)


def trimmed(D: np.ndarray, density: float) -> np.ndarray:
    k = int(density * D.size)
    return np.where(np.abs(D) >= np.sort(np.abs(D).ravel())[-k], D, 0)


def test_ties_against_its_paper():
    model = three()
    model.add_weighted_adapter(["one", "two"], [1.0, -0.5], "ties", "ties", svd_rank=30, density=0.3)
    one, two, found = deltas(model, "one"), deltas(model, "two"), deltas(model, "ties")
    path = next(p for p in one if p in two)
    pruned = np.stack([trimmed(one[path], 0.3), -0.5 * trimmed(two[path], 0.3)])
    elected = np.sign(pruned.sum(0))
    agree = (np.sign(pruned) == elected) & (pruned != 0)
    wanted = np.divide((pruned * agree).sum(0), agree.sum(0), where=agree.any(0), out=np.zeros_like(elected))
    np.testing.assert_allclose(found[path], wanted, atol=2e-5)


def test_pruning_by_magnitude_against_its_definition():
    model = three()
    model.add_weighted_adapter(["one", "two"], [1.0, 2.0], "new", "magnitude_prune_svd", svd_rank=30, density=0.5)
    one, two, found = deltas(model, "one"), deltas(model, "two"), deltas(model, "new")
    path = next(p for p in one if p in two)
    np.testing.assert_allclose(found[path], trimmed(one[path], 0.5) + 2 * trimmed(two[path], 0.5), atol=2e-5)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_keeps_the_mean(kind: str):
    """Each entry is dropped or made larger by 1 / density; without dropping nothing changes."""
    model = three()
    model.add_weighted_adapter(["one"], [1.0], "whole", kind, svd_rank=30, density=1.0)
    model.add_weighted_adapter(["one"], [1.0], "half", kind, svd_rank=30, density=0.5)
    one, whole, half = (deltas(model, name) for name in ("one", "whole", "half"))
    for path in one:
        np.testing.assert_allclose(whole[path], one[path], atol=2e-5)
        kept = np.abs(half[path]) > 1e-4
        np.testing.assert_allclose(half[path][kept], 2 * one[path][kept], rtol=1e-2, atol=1e-4)
        assert 0.35 < kept.mean() < 0.65


def test_what_cannot_be_combined_is_refused_and_nothing_changes():
    model = three()
    before = list(model.peft_config)
    bad = [
        (dict(adapters=["one", "twoo"], weights=[1, 1]), "no adapter is called 'twoo'"),
        (dict(adapters=["one", "two"], weights=[1]), "each adapter needs one weight"),
        (dict(adapters=["one", "two"], weights=[1, float("nan")]), "weights must be finite"),
        (dict(adapters=["one"], weights=[float("inf")], combination_type="cat"), "weights must be finite"),
        (dict(adapters=["one"], weights=[1], adapter_name="two"), "already has an adapter"),
        (dict(adapters=["one"], weights=[1], combination_type="tie"), "ties"),
        (dict(adapters=["one"], weights=[1], combination_type="ties"), "density"),
        (dict(adapters=["one", "dora"], weights=[1, 1], combination_type="cat"), "no low-rank factors"),
        (dict(adapters=["one"], weights=[1], svd_rank=0), "at least 1"),
    ]
    for arguments, message in bad:
        with pytest.raises(VeneerError, match=message):
            model.add_weighted_adapter(**{"adapter_name": "sum", **arguments})
    with pytest.raises(TypeError, match="svd_drive"):
        model.add_weighted_adapter(["one"], [1], "sum", svd_drive="x")
    assert list(model.peft_config) == before


def test_pefts_arguments_are_taken_in_pefts_order():
    model = three()
    model.add_weighted_adapter(["one"], [1.0], "sum", "ties_svd", 2, None, False, None, 0.5, "frequency")
    assert model.peft_config["sum"].r == 2


def test_a_prompt_is_no_weight_update():
    model = get_peft_model(models.build("llama"), veneer.PromptTuningConfig(num_virtual_tokens=3)).eval()
    with pytest.raises(NotMergeable, match="adapts no layers"):
        veneer.convert_to_lora(model)


# Conversion


CHANGES_BIAS = ("adamss", "beft", "bitfit", "glora", "ia3", "ln_tuning", "lora_bias", "road")


@pytest.mark.parametrize("case", [c for c in ONE_EACH if c in MERGEABLE], ids=str)
def test_a_weight_method_becomes_the_same_lora(case: Case, tmp_path):
    model, batch = case.build(), case.inputs()
    if case.method in CHANGES_BIAS:
        with pytest.raises(NotMergeable):
            veneer.convert_to_lora(model)
        return
    veneer.save_as_lora(tmp_path, model)
    plain = PeftModel.from_pretrained(models.build(case.model), tmp_path)
    assert type(plain.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(output(plain, batch), output(model, batch), rtol=1e-3, atol=1e-4)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(models.build(case.model), tmp_path).eval()
    torch.testing.assert_close(output(theirs, batch), output(plain, batch), **TOLERANCE)


def test_a_low_rank_method_keeps_its_rank(tmp_path):
    model = next(c for c in ONE_EACH if c.method == "vera").build()
    config, tensors = veneer.convert_to_lora(model)
    assert config.r == 5 and all(t.shape[0] == 5 for key, t in tensors.items() if "lora_A" in key)


def test_a_lora_on_convolutions_and_embeddings_converts(tmp_path):
    for name, settings in (("conv", ["first", "third", "head"]), ("gpt2", ["wte", "c_attn"])):
        model = perturb(get_peft_model(models.build(name), LoraConfig(r=3, target_modules=settings)).eval())
        veneer.save_as_lora(tmp_path / name, model, rank=2)
        plain = PeftModel.from_pretrained(models.build(name), tmp_path / name)
        for path, D in deltas(model, "default").items():
            tail = np.linalg.svd(D, compute_uv=False)[2:]
            found = deltas(plain, "default")[path]
            np.testing.assert_allclose(np.linalg.norm(found - D), np.linalg.norm(tail), rtol=1e-2, atol=1e-5)


def test_a_share_of_the_energy_takes_the_least_rank():
    model = next(c for c in ONE_EACH if c.method == "loha").build()
    config, tensors = veneer.convert_to_lora(model, rank=0.9)
    for path, D in deltas(model, "default").items():
        S = np.linalg.svd(D, compute_uv=False) ** 2
        least = int(np.searchsorted(np.cumsum(S), 0.9 * S.sum())) + 1
        assert tensors[f"base_model.model.{path}.lora_A.weight"].shape[0] == least


def test_trained_copies_go_along(tmp_path):
    settings = dict(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = perturb(get_peft_model(models.build("llama"), LoraConfig(**settings)).eval())
    veneer.save_as_lora(tmp_path, model)
    plain = PeftModel.from_pretrained(models.build("llama"), tmp_path)
    batch = models.inputs("llama")
    torch.testing.assert_close(output(plain, batch), output(model, batch), **TOLERANCE)


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(VeneerError, match="rank"):
        veneer.convert_to_lora(three(), rank, "one")


def test_a_bias_has_no_place_in_a_lora():
    settings = dict(r=3, target_modules=["q_proj"], bias="lora_only")
    model = perturb(get_peft_model(models.build("llama"), LoraConfig(**settings)).eval())
    with pytest.raises(NotMergeable, match="bias"):
        veneer.convert_to_lora(model)


def test_the_best_rank_of_a_product_and_of_a_dense_matrix_agree():
    torch.manual_seed(0)
    A, B = torch.randn(40, 300, dtype=torch.float64), torch.randn(250, 40, dtype=torch.float64)
    D = B @ A
    for rank in (5, 12):
        small, dense = compress(A, B, rank), truncate(D, rank)
        U, S, Vh = torch.linalg.svd(D)
        best = U[:, :rank] * S[:rank] @ Vh[:rank]
        torch.testing.assert_close(small[1] @ small[0], best)
        torch.testing.assert_close(dense[1] @ dense[0], best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_a_strong_new_direction_is_taken_back(target: str):
    """An update of rank one that is far from all of the weight's directions: what is left of it is as asked."""
    model = get_peft_model(models.build("llama"), LoraConfig(r=2, target_modules=[target])).eval()
    layer = next(iter(state_of(model.get_base_model()).layers.values()))
    W = layer.target.original_weight()
    A, B = (mine.detach() for mine in layer.adapters["default"].matrices())
    A.zero_()
    B.zero_()
    A[0, 3] = 1.0
    B[:, 0] = 100 * torch.ones(B.shape[0])
    before = deltas(model, "default")[layer.path]
    told = []
    settings = dict(top_k=1, threshold_epsilon=0.99, mitigation_lambda=0.25)
    veneer.reduce_intruder_dimension(model, **settings, logging_sink=told.append)
    assert model.active_adapters == ["intruder_reduced"] and "Intruders: 1" in told[0]
    after = deltas(model, "intruder_reduced")[layer.path]
    U, S, Vh = np.linalg.svd(W.detach().numpy() + before, full_matrices=False)
    np.testing.assert_allclose(after, before - 0.75 * S[0] * np.outer(U[:, 0], Vh[0]), rtol=0, atol=1e-2)
    veneer.reduce_intruder_dimension(model, "default", "same", threshold_epsilon=1e-9, logging_sink=None)
    np.testing.assert_allclose(deltas(model, "same")[layer.path], before, rtol=1e-4, atol=1e-5)


def test_intruders_are_known_of_lora_alone():
    model = get_peft_model(models.build("llama"), veneer.IA3Config(target_modules=["q_proj"]))
    with pytest.raises(VeneerError, match="for LoRA only"):
        veneer.reduce_intruder_dimension(model)
    assert list(model.peft_config) == ["default"]
