"""Methods that come from AdapterHub's library and pyreft, derived again in NumPy with no code of veneer's."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import veneer
from veneer import ConfigError, TargetError, get_peft_model

from . import models
from .test_numpy import TOLERANCE, arr, attach, state, watching


def values(adapter) -> dict[str, np.ndarray]:
    return {name.removesuffix(".weight"): arr(p) for name, p in adapter.named_parameters()}


def orthonormal_rows(P: np.ndarray) -> np.ndarray:
    """Gram and Schmidt, one row after the other."""
    rows: list[np.ndarray] = []
    for row in P:
        row = row - sum((row @ q) * q for q in rows)
        rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


# ReFT


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("config", [veneer.LoReftConfig, veneer.NoReftConfig, veneer.DiReftConfig])
def test_reft(config, name: str):
    """h + R^T (W h + b - R h) at the first 2 and the last 1 tokens of each row, elsewhere h; DiReFT without R h."""
    model = attach(name, config(r=4, prefix_positions=2, suffix_positions=1))
    batch = models.inputs(name)
    batch["attention_mask"] = torch.tensor([[1] * 7, [0, 0] + [1] * 5, [1] * 6 + [0]])
    real = [range(7), range(2, 7), range(6)]
    layers = state(model).layers
    assert len(layers) == (3 if name == "t5" else 2) and not any("decoder.block" in path for path in layers)
    for layer in layers.values():
        parts = {"prefix": {}, "suffix": {}}
        for key, value in values(layer.adapters["default"]).items():
            parts[key.split(".")[0].removeprefix("reft_")][key.split(".", 1)[1]] = value
        with watching(layer.base_layer) as inner, watching(layer) as outer, torch.no_grad():
            model(**batch)
        y, expected = inner[0][1], inner[0][1].copy()
        for row, tokens in enumerate(real):
            for part, places in (("prefix", tokens[:2]), ("suffix", tokens[-1:])):
                p = parts[part]
                W, b, R = p["learned_source"], p["learned_source.bias"], p["projection"]
                R = orthonormal_rows(R) if config is veneer.LoReftConfig else R
                for place in places:
                    h = y[row, place]
                    inside = 0 if config is veneer.DiReftConfig else R @ h
                    expected[row, place] = h + R.T @ (W @ h + b - inside)
        assert np.abs(expected - y).max() > 0.1
        np.testing.assert_allclose(outer[0][1], expected, **TOLERANCE)


def edited(model, **call) -> list[list[int]]:
    """Which tokens of each row the first layer's edit changes."""
    layer = next(iter(state(model).layers.values()))
    with watching(layer.base_layer) as inner, watching(layer) as outer, torch.no_grad():
        model(**call)
    return [np.flatnonzero(row).tolist() for row in np.abs(outer[0][1] - inner[0][1]).max(-1) > 1e-6]


def test_refts_prompt_ends_where_the_answer_begins():
    model = attach("llama", veneer.LoReftConfig(r=2, prefix_positions=1, suffix_positions=2))
    ids = models.inputs("llama")["input_ids"]
    mask = torch.tensor([[1] * 7, [0, 0] + [1] * 5, [1] * 6 + [0]])
    labels = ids.masked_fill(mask == 0, -100)
    assert edited(model, input_ids=ids) == [[0, 5, 6]] * 3
    assert edited(model, input_ids=ids, attention_mask=mask, labels=labels) == [[0, 5, 6], [2, 5, 6], [0, 4, 5]]
    labels[:, :4] = -100
    assert edited(model, input_ids=ids, attention_mask=mask, labels=labels) == [[0, 2, 3], [2, 3], [0, 2, 3]]
    assert edited(model, input_ids=ids, attention_mask=mask, prompt_lengths=[1, 3, 5]) == [[0], [2, 3, 4], [0, 3, 4]]
    everywhere = attach("llama", veneer.LoReftConfig(r=2, prefix_positions="all"))
    assert edited(everywhere, input_ids=ids, attention_mask=mask) == [[*range(7)], [*range(2, 7)], [*range(6)]]


def test_labels_that_are_not_the_models_own_tokens_end_no_prompt():
    model = get_peft_model(
        models.bert("ForTokenClassification"), veneer.LoReftConfig(r=2, prefix_positions=3, task_type="TOKEN_CLS")
    )
    models.perturb(model.eval(), scale=0.3)
    ids, labels = models.inputs("bert")["input_ids"], torch.full((3, 7), -100)
    labels[:, 1:] = 1
    assert edited(model, input_ids=ids, labels=labels) == [[0, 1, 2]] * 3


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_reft_generates_with_padding_as_without(name: str):
    """Also behind a learned prompt, and for an encoder that `generate` calls past the model, with another batch."""
    model = attach(name, veneer.LoReftConfig(r=4, prefix_positions=2, suffix_positions=2))
    model.base_model.model.generation_config.eos_token_id = None
    ids = models.inputs(name)["input_ids"]
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], dim=1)
    scores = dict(do_sample=False, max_new_tokens=4, output_scores=True, return_dict_in_generate=True)
    model.generate(input_ids=ids[:2, :4], max_new_tokens=2)
    right = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **scores).scores
    if name == "t5":  # relative positions: padding on the right leaves them alone
        padded = torch.cat([ids, torch.zeros(3, 2, dtype=torch.long)], dim=1)
    found = model.generate(input_ids=padded, attention_mask=(padded > 0).long(), **scores).scores
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        base = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **scores).scores
    assert (base[0] - right[0]).abs().max() > 0.01


def test_reft_counts_from_behind_a_learned_prompt():
    model = attach("llama", veneer.LoReftConfig(r=2, prefix_positions=1, suffix_positions=1))
    model.add_adapter("prompt", veneer.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model.set_adapter(["default", "prompt"])
    assert edited(model, input_ids=models.inputs("llama")["input_ids"]) == [[3, 9]] * 3


def test_refts_fields():
    assert list(state(attach("llama", veneer.LoReftConfig(layers=[1]))).layers) == ["model.layers.1"]
    for wrong in (dict(layers="some"), dict(prefix_positions="last"), dict(prefix_positions=0), dict(r=0)):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            veneer.LoReftConfig(**wrong)
    with pytest.raises(TargetError, match="no target lies in layer 7"):
        attach("llama", veneer.LoReftConfig(layers=[7]))
    with pytest.raises(TargetError, match="orthonormal"):
        attach("llama", veneer.LoReftConfig(r=31))


# Bottlenecks

GELU = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))


def normed(h: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = h - h.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def called(model, name: str, path: str):
    """(input, output of the bare module, output with adapters) of one layer in a call of the whole model."""
    layer = state(model).layers[path]
    with watching(layer.base_layer) as inner, watching(layer) as outer, torch.no_grad():
        model(**models.inputs(name))
    return *inner[0], outer[0][1]


PLACES = {
    "llama": ("model.layers.{}", "self_attn.o_proj", "mlp.down_proj", "mlp"),
    "gpt2": ("transformer.h.{}", "attn.c_proj", "mlp.c_proj", "mlp"),
    "bert": ("bert.encoder.layer.{}", "attention.output.dense", "output.dense", None),
    "t5": ("encoder.block.{}", "layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo", "layer.1.DenseReluDense"),
}
ends_of = pytest.mark.parametrize("name", PLACES)


@ends_of
def test_presets_stand_where_their_papers_have_them(name: str):
    layer, attention, mlp, _ = PLACES[name]
    first = {
        veneer.SeqBnConfig: [layer],
        veneer.DoubleSeqBnConfig: [f"{layer}.{attention}", f"{layer}.{mlp}"],
        veneer.CompacterConfig: [f"{layer}.{attention}", f"{layer}.{mlp}"],
        veneer.CompacterPlusPlusConfig: [f"{layer}.{mlp}"],
        veneer.AdapterPlusConfig: [f"{layer}.{mlp}"],
    }
    for config, places in first.items():
        more = dict(phm_dim=5) if issubclass(config, veneer.CompacterConfig) else {}
        found = {p for p in state(attach(name, config(**more))).layers if "decoder" not in p}
        assert found == {place.format(i) for place in places for i in range(3 if name == "t5" else 2)}


@ends_of
@pytest.mark.parametrize("scaling", [4.0, "learned", "channel"])
def test_parallel(name: str, scaling):
    """MLP(x) + s up(relu(down(x))), also where the MLP is no module of its own (BERT: its second layer writes)."""
    model = attach(name, veneer.ParBnConfig(reduction_factor=5, scaling=scaling))
    layer, _, mlp, block = PLACES[name]
    end = f"{layer}.{block or mlp}".format(1)
    x, y, out = called(model, name, end)
    p = values(state(model).layers[end].adapters["default"])
    if block is None:
        x = called(model, name, f"{layer}.intermediate.dense".format(1))[0]
    s = p["adapter_scaling"] if isinstance(scaling, str) else 4
    hidden = np.maximum(x @ p["adapter_down"].T + p["adapter_down.bias"], 0)
    assert p["adapter_down"].shape == (6, 30) and np.shape(s) == {"channel": (30,), "learned": (1,)}.get(scaling, ())
    expected = y + s * (hidden @ p["adapter_up"].T + p["adapter_up.bias"])
    assert np.abs(expected - y).max() > 0.1
    np.testing.assert_allclose(out, expected, **TOLERANCE)


def test_two_parallel_adapters_on_bert_and_a_mixed_batch(tmp_path):
    """Each reads the rows of its own; the file of an MLP that is no module says where it begins."""
    model = attach("bert", veneer.ParBnConfig(reduction_factor=5))
    model.add_adapter("other", veneer.ParBnConfig(reduction_factor=3))
    models.perturb(model, "other", 5, 0.3)
    batch, names = models.inputs("bert", rows=4), ["default", "other", "__base__", "default"]
    mixed = models.output(model, batch, adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter("other" if name == "other" else "default")
        with model.disable_adapter() if name == "__base__" else nullcontext():
            alone = models.output(model, {"input_ids": batch["input_ids"][row : row + 1]})
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    model.set_adapter(["default", "other"])
    models.output(model, batch)
    model.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(models.build("bert"), tmp_path)
    model.set_adapter("default")
    assert torch.equal(models.output(loaded, batch), models.output(model, batch))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_sequential_with_norms_and_scaling(name: str):
    """z + LN2(s * up(tanh(down(LN1(z))))), z a layer's output."""
    settings = dict(reduction_factor=4, non_linearity="tanh", ln_before=True, ln_after=True, scaling="channel")
    model = attach(name, veneer.SeqBnConfig(**settings))
    path = PLACES[name][0].format(1)
    _, z, out = called(model, name, path)
    p = values(state(model).layers[path].adapters["default"])
    seen = normed(z, p["adapter_norm_before"], p["adapter_norm_before.bias"])
    hidden = np.tanh(seen @ p["adapter_down"].T + p["adapter_down.bias"])
    update = p["adapter_scaling"] * (hidden @ p["adapter_up"].T + p["adapter_up.bias"])
    expected = z + normed(update, p["adapter_norm_after"], p["adapter_norm_after.bias"])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_adapter_plus():
    """y + s * up(gelu(down(y))); in training whole rows stay as they were, the others grow by 1 / (1 - p)."""
    model = attach("llama", veneer.AdapterPlusConfig(stochastic_depth=0.5))
    path = "model.layers.0.mlp.down_proj"
    _, y, out = called(model, "llama", path)
    layer = state(model).layers[path]
    p = values(layer.adapters["default"])
    hidden = GELU(y @ p["adapter_down"].T + p["adapter_down.bias"])
    update = p["adapter_scaling"] * (hidden @ p["adapter_up"].T + p["adapter_up.bias"])
    np.testing.assert_allclose(out, y + update, **TOLERANCE)
    x = torch.randn(20, 3, 45)
    whole, base = layer(x) - layer.base_layer(x), layer.base_layer(x)
    change = layer.train()(x) - base
    gone = (change == 0).flatten(1).all(1)
    assert 3 < gone.sum() < 17
    torch.testing.assert_close(change[~gone], 2 * whole[~gone], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("start", "std", "last"), [("bert", 0.02, 0.02), ("houlsby", 0.0088, 0.0088), (True, 0.105, 0)]
)
def test_starts(start, std: float, last: float):
    """N(0, 0.02); N(0, 0.01) cut at two deviations; uniform up to 1 / sqrt(width), with zero at the end."""
    config = veneer.DoubleSeqBnConfig(reduction_factor=0.05, init_weights=start)
    for layer in state(attach("llama", config, 0.0)).layers.values():
        p = values(layer.adapters["default"])
        assert p["adapter_down"].std() == pytest.approx(std, rel=0.05)
        assert p["adapter_up"].std() == pytest.approx(last, rel=0.05)
        assert not p["adapter_up.bias"].any() and not p["adapter_down.bias"].any()
        assert start != "houlsby" or np.abs(p["adapter_down"]).max() <= 0.02


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("factorized", [True, False])
@ends_of
def test_compacter(name: str, shared: bool, factorized: bool):
    """W = sum_i A_i (x) (s_i t_i) by np.kron; y + (gelu(y W_down + b) W_up + b)."""
    n, settings = 5, dict(shared_phm_rule=shared, factorized_phm_rule=factorized, phm_init_range=0.5)
    config = veneer.CompacterConfig(phm_dim=n, phm_rank=2, reduction_factor=3, **settings)
    model = attach(name, config)
    layer, attention, mlp, _ = PLACES[name]
    for path in (f"{layer}.{attention}".format(0), f"{layer}.{mlp}".format(1)):
        _, y, out = called(model, name, path)
        p = values(state(model).layers[path].adapters["default"])
        h = y
        for side in ("adapter_down", "adapter_up"):
            rule = {k.removeprefix(f"{side}.rule."): v for k, v in p.items()}
            rule = values(state(model).shared["default"]) if shared else rule
            A = (
                np.einsum("iab,ibc->iac", rule["phm_rule_left"], rule["phm_rule_right"])
                if factorized
                else rule["phm_rule"]
            )
            W = sum(np.kron(A[i], p[f"{side}.W_left"][i] @ p[f"{side}.W_right"][i]) for i in range(n))
            h = h @ W + p[f"{side}.b"]
            h = GELU(h) if side == "adapter_down" else h
        assert W.shape == (10, 30) and np.abs(h).max() > 0.1
        np.testing.assert_allclose(out, y + h, rtol=1e-4, atol=1e-4)


def test_compacters_sizes():
    """A bottleneck is rounded to a multiple of n; a width that n does not divide is refused; the file is tiny."""
    model = attach("llama", veneer.CompacterPlusPlusConfig(phm_dim=3, reduction_factor=30))
    p = values(state(model).layers["model.layers.0.mlp.down_proj"].adapters["default"])
    assert p["adapter_down.W_right"].shape == (3, 1, 1)
    assert model.parameter_plan().expected == 2 * (30 + 3 + 3 + 3 + 30 + 30) + 27
    with pytest.raises(TargetError, match="phm_dim = 4 does not divide 30"):
        attach("llama", veneer.CompacterConfig())
    with pytest.raises(ConfigError, match="houlsby or pfeiffer"):
        veneer.CompacterConfig(placement="parallel")


# Invertible adapters


def network(p: dict, name: str, h: np.ndarray) -> np.ndarray:
    hidden = np.maximum(h @ p[f"{name}.down"].T + p[f"{name}.down.bias"], 0)
    return hidden @ p[f"{name}.up"].T + p[f"{name}.up.bias"]


def coupling(p: dict, h: np.ndarray, kind: str, back: bool) -> np.ndarray:
    """u' = e(s) u + t of F(v), then v' of G(u'); or backwards."""

    def moved(part, other, name):
        out = network(p, f"inv_adapter_{name}", other)
        s, t = np.split(out, 2, axis=-1) if kind == "glow" else (0 * out, out)
        factor = np.exp(5 * 2 / np.pi * np.arctan(s / 5))
        return (part - t) / factor if back else factor * part + t

    u, v = np.split(h, 2, axis=-1)
    for name in "GF" if back else "FG":
        if name == "F":
            u = moved(u, v, "F")
        else:
            v = moved(v, u, "G")
    return np.concatenate([u, v], axis=-1)


@pytest.mark.parametrize("kind", ["nice", "glow"])
@ends_of
def test_invertible(name: str, kind: str):
    model = attach(name, veneer.SeqBnInvConfig(inv_adapter=kind), 0.1)
    layers, p = state(model).layers, values(state(model).shared["default"])
    embedding = {"llama": "model.embed_tokens", "gpt2": "transformer.wte", "t5": "decoder.embed_tokens"}
    path = embedding.get(name, "bert.embeddings.word_embeddings")
    assert p["inv_adapter_F.up"].shape == (15 if kind == "nice" else 30, 7)
    _, y, out = called(model, name, path)
    assert np.abs(out - y).max() > 0.1
    np.testing.assert_allclose(out, coupling(p, y, kind, False), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(coupling(p, out, kind, True), y, rtol=1e-4, atol=1e-4)
    assert (name == "t5") == ("encoder.embed_tokens" in layers) and (name != "bert") == ("lm_head" in layers)
    if name == "bert":  # a classifier is no head that words are tied to
        return
    with watching(layers["lm_head"].base_layer) as inner, watching(layers["lm_head"]) as outer, torch.no_grad():
        model(**models.inputs(name))
    np.testing.assert_allclose(inner[0][0], coupling(p, outer[0][0], kind, True), rtol=1e-4, atol=1e-4)


def test_invertible_with_an_odd_width_and_what_it_refuses():
    config = veneer.SeqBnInvConfig(target_modules=["wte", "lm_head"], output_modules=["lm_head"], inv_adapter="glow")
    base = models.gpt2(n_embd=35).eval()
    model = models.perturb(get_peft_model(base, config), scale=0.2)
    enter, leave = (state(model).layers[path].adapters["default"] for path in ("transformer.wte", "lm_head"))
    h = torch.randn(2, 3, 35)
    torch.testing.assert_close(leave.pre(enter.post(h, h)), h, rtol=1e-4, atol=1e-5)
    assert (enter.post(h, h) - h).abs().max() > 0.1
    with pytest.raises(TargetError, match="needs the input embedding"):
        attach("llama", veneer.SeqBnInvConfig(target_modules=["down_proj"]))
    with pytest.raises(TargetError, match="output_modules: 'head'"):
        attach("llama", veneer.SeqBnInvConfig(target_modules=["embed_tokens", "lm_head"], output_modules=["head"]))


# Unions

PREFIX = dict(num_virtual_tokens=3)


def test_a_union_computes_its_methods_one_after_the_other():
    """LoRA inside, a bottleneck around it: y = W x + 2 B A x, then y + up(relu(down(y)))."""
    lora = veneer.LoraConfig(r=4, lora_alpha=8, target_modules=["down_proj"])
    bottleneck = veneer.BottleneckConfig(reduction_factor=5, target_modules=["down_proj"])
    model = attach("llama", veneer.UnionConfig(configs=[lora, bottleneck]))
    path = "model.layers.1.mlp.down_proj"
    x, y, out = called(model, "llama", path)
    low_rank, small = (values(part) for part in state(model).layers[path].adapters["default"].parts)
    y = y + 2 * x @ low_rank["lora_A"].T @ low_rank["lora_B"].T
    hidden = np.maximum(y @ small["adapter_down"].T + small["adapter_down.bias"], 0)
    np.testing.assert_allclose(out, y + hidden @ small["adapter_up"].T + small["adapter_up.bias"], **TOLERANCE)


def test_a_union_of_mergeable_methods_merges_and_unmerges():
    configs = [veneer.LoraConfig(r=4), veneer.IA3Config(), veneer.LNTuningConfig()]
    model, batch = attach("llama", veneer.UnionConfig(configs=configs)), models.inputs("llama")
    active = models.output(model, batch)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    torch.testing.assert_close(models.output(model, batch), active, rtol=2e-4, atol=2e-5)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_union_keeps_the_callers_configs_and_every_fact_of_its_members():
    reft, lora = veneer.LoReftConfig(r=2, prefix_positions=1, suffix_positions=1), veneer.LoraConfig(r=3)
    model = attach("llama", veneer.UnionConfig(configs=[lora, reft]))
    assert reft.target_modules is None and lora.target_modules is None
    ids = models.inputs("llama")["input_ids"]
    layer = state(model).layers["model.layers.0"]
    with watching(layer.base_layer) as inner, watching(layer) as outer, torch.no_grad():
        model(input_ids=ids, prompt_lengths=[2, 3, 4])
    changed = np.abs(outer[0][1] - inner[0][1]).max(-1) > 1e-6
    assert [np.flatnonzero(row).tolist() for row in changed] == [[0, 1], [0, 2], [0, 3]]
    model.generate(input_ids=ids, max_new_tokens=2)


@pytest.mark.parametrize(
    ("configs", "said"),
    [
        ([], "name the methods"),
        ([3], "not 3"),
        ([dict(peft_type="LORE")], "LORA"),
        ([veneer.AdaLoraConfig(total_step=9)], "schedule"),
        ([veneer.LoraConfig(modules_to_save=["lm_head"])], "modules_to_save"),
        ([veneer.LoraConfig(), veneer.LoraConfig()], "same keys"),
        ([veneer.VeraConfig(r=3), veneer.CompacterConfig(phm_dim=5)], "shared module"),
        ([veneer.PrefixTuningConfig(**PREFIX), veneer.PromptTuningConfig(**PREFIX)], "prompt"),
        ([veneer.LoraConfig(target_modules=["q_porj"])], "q_proj"),
    ],
)
def test_a_union_refuses_what_it_cannot_hold(configs, said: str):
    model = models.build("llama")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(veneer.VeneerError, match=said):
        get_peft_model(model, veneer.UnionConfig(configs=configs))
    assert [name for name, _ in model.named_modules()] == names


def test_defaults_of_mam_and_unipelt():
    mam, unipelt = veneer.MAMConfig(), veneer.UniPELTConfig()
    assert [c.peft_type for c in mam.configs] == ["PREFIX_TUNING", "PAR_BN"]
    assert [c.peft_type for c in unipelt.configs] == ["LORA", "PREFIX_TUNING", "SEQ_BN"]
    assert mam.configs[0].num_virtual_tokens == 30 and unipelt.configs[0].lora_alpha == 2
    for config in (mam, unipelt):
        model = get_peft_model(models.build("llama"), config).train()
        batch = models.inputs("llama")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        assert all(p.grad is not None for p in state(model).parameters("default"))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_mam_is_its_two_methods(name: str):
    """The prefix by PrefixTuning's own test, the parallel adapter by its formula: here that both act, and no more."""
    parts = [veneer.PrefixTuningConfig(**PREFIX), veneer.ParBnConfig(reduction_factor=5)]
    model, batch = attach(name, veneer.MAMConfig(configs=parts)), models.inputs(name)
    apart = get_peft_model(models.build(name), parts[0], "prefix").eval()
    apart.add_adapter("parallel", parts[1])
    apart.set_adapter(["prefix", "parallel"])
    with torch.no_grad():
        for mine, theirs in zip(state(model).parameters("default"), both(state(apart)), strict=True):
            theirs.copy_(mine)
    torch.testing.assert_close(models.output(model, batch), models.output(apart, batch))
    apart.set_adapter("prefix")
    assert (models.output(model, batch) - models.output(apart, batch)).abs().max() > 0.01


def both(found):
    yield from found.parameters("parallel")
    yield from found.parameters("prefix")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unipelts_gates(name: str):
    """y + g (2 / r B A x) with g of x; y + g up(..) with g of y; the prefix's keys and values times a row's g."""
    parts = [veneer.LoraConfig(r=4, lora_alpha=2), veneer.PrefixTuningConfig(**PREFIX)]
    parts += [veneer.DoubleSeqBnConfig(reduction_factor=5, non_linearity="relu")]
    model = attach(name, veneer.UniPELTConfig(configs=parts))
    layer, _, mlp, _ = PLACES[name]
    path = f"{layer}.{mlp}".format(1)
    _, y, out = called(model, name, path)
    p = values(state(model).layers[path].adapters["default"])
    hidden = np.maximum(y @ p["inner.adapter_down"].T + p["inner.adapter_down.bias"], 0)
    update = hidden @ p["inner.adapter_up"].T + p["inner.adapter_up.bias"]
    np.testing.assert_allclose(out, y + sigmoid(y @ p["gate"].T + p["gate.bias"]) * update, **TOLERANCE)

    path = {"llama": "model.layers.1.self_attn.q_proj", "gpt2": "transformer.h.1.attn.c_attn"}[name]
    x, y, out = called(model, name, path)
    p = values(state(model).layers[path].adapters["default"])
    update = 2 / 4 * x @ p["inner.lora_A"].T @ p["inner.lora_B"].T
    np.testing.assert_allclose(out, y + sigmoid(x @ p["gate"].T + p["gate.bias"]) * update, **TOLERANCE)

    path = {"llama": "model.layers.1.self_attn", "gpt2": "transformer.h.1.attn"}[name]
    p = values(state(model).layers[path].adapters["default"])
    ids, mask = models.inputs(name)["input_ids"], torch.tensor([[1] * 7, [0, 0] + [1] * 5, [1] * 7])
    with watching(state(model).layers[path]) as seen, torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask, prompt_lengths=[7, 4, 2], use_cache=True).past_key_values
    pair, g = state(model).prompts["default"].key_values({})[1], seen[0][0] @ p["prefix_gate"].T
    g = sigmoid(g + p["prefix_gate.bias"])
    for row, prompt in enumerate([slice(0, 7), slice(2, 6), slice(0, 2)]):
        for learned, found in zip(pair, (cache.layers[1].keys, cache.layers[1].values), strict=True):
            np.testing.assert_allclose(arr(found[row, :, :3]), arr(learned) * g[row, prompt].mean(), **TOLERANCE)


# AdapterFusion


def fused(name: str, config=None, **settings):
    """A model with three adapters and a fusion of them, which alone is active."""
    model = attach(name, config or veneer.DoubleSeqBnConfig(reduction_factor=3))
    for i, (other, factor) in enumerate((("two", 5), ("three", 7))):
        model.add_adapter(other, config or veneer.DoubleSeqBnConfig(reduction_factor=factor))
        models.perturb(model, other, 30 + i, 0.3)
    model.add_adapter("fusion", veneer.AdapterFusionConfig(adapter_names=["default", "two", "three"], **settings))
    model.set_adapter("fusion")
    return models.perturb(model, "fusion", 40, 0.3)


@pytest.mark.parametrize("value", [True, False])
@ends_of
def test_fusion(name: str, value: bool):
    """y + sum_i a_i V u_i, a = softmax_i((Q y + q) . (K u_i + k)), u_i = up(f(down(y)))."""
    model = fused(name, value=value)
    layer, attention, mlp, _ = PLACES[name]
    for path in (f"{layer}.{attention}".format(0), f"{layer}.{mlp}".format(1)):
        _, y, out = called(model, name, path)
        adapters = state(model).layers[path].adapters
        updates = []
        for other in ("default", "two", "three"):
            p = values(adapters[other])
            h = y @ p["adapter_down"].T + p["adapter_down.bias"]
            updates.append(h * sigmoid(h) @ p["adapter_up"].T + p["adapter_up.bias"])
        u, p = np.stack(updates), values(adapters["fusion"])
        q, k = y @ p["fusion_query"].T + p["fusion_query.bias"], u @ p["fusion_key"].T + p["fusion_key.bias"]
        a = np.exp(np.einsum("brd,nbrd->nbr", q, k) - 50)
        a /= a.sum(0)
        assert a.std() > 0.01
        V = p["fusion_value"] if value else np.eye(30)
        np.testing.assert_allclose(out, y + np.einsum("nbr,nbrd->brd", a, u @ V.T), rtol=1e-4, atol=1e-4)


def test_a_fusions_start_and_loss():
    """Nearly the mean of what the adapters add; |V - I|^2 / 100 is part of the loss."""
    model = fused("llama")
    batch = models.inputs("llama")
    batch["labels"] = batch["input_ids"]
    with torch.enable_grad():
        whole = model(**batch).loss.item()
    with torch.no_grad():
        plain = model(**batch).loss.item()
    V = [values(a)["fusion_value"] for a in state(model).adapters("fusion").values()]
    assert whole - plain == pytest.approx(0.01 * sum(((v - np.eye(30)) ** 2).sum() for v in V), rel=1e-4)
    fresh = fused("llama")
    fresh.add_adapter("start", veneer.AdapterFusionConfig(adapter_names=["default", "two"]))
    for adapter in state(fresh).adapters("start").values():
        np.testing.assert_array_equal(values(adapter)["fusion_value"], np.eye(30))
        y = torch.randn(2, 3, 30)
        u = adapter.updates(y, y)
        torch.testing.assert_close(adapter.post(y, y) - y, u.mean(-2), rtol=0.3, atol=0.3)


def test_a_fusion_leaves_its_adapters_alone():
    model, batch = fused("llama"), models.inputs("llama")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for name in ("default", "two", "three"):
        assert all(p.grad is None and not p.requires_grad for p in state(model).parameters(name))
    assert all(p.grad is not None for p in state(model).parameters("fusion"))


def test_a_fusion_needs_its_adapters(tmp_path):
    model = fused("llama")
    model.save_pretrained(tmp_path, selected_adapters=["fusion"])
    with pytest.raises(TargetError, match="reads adapter 'default'"):
        get_peft_model(models.build("llama"), veneer.AdapterFusionConfig(adapter_names=["default", "two"]))
    other = get_peft_model(models.build("llama"), veneer.DoubleSeqBnConfig(reduction_factor=3))
    with pytest.raises(veneer.VeneerError, match="reads adapter 'two'"):
        other.load_adapter(tmp_path / "fusion", "fusion")
    assert list(other.peft_config) == ["default"]
    model.delete_adapter("two")
    with pytest.raises(veneer.VeneerError, match="reads adapter 'two'"):
        model(**models.inputs("llama"))
    other.add_adapter("prompt", veneer.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(TargetError, match="'prompt' adapts none"):
        other.add_adapter("fusion", veneer.AdapterFusionConfig(adapter_names=["default", "prompt"]))
    other.add_adapter("lora", veneer.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TargetError, match="no module in common"):
        other.add_adapter("fusion", veneer.AdapterFusionConfig(adapter_names=["default", "lora"]))
    with pytest.raises(ConfigError, match="two different adapters"):
        veneer.AdapterFusionConfig(adapter_names=["one", "one"])


def test_a_fusion_of_edits_knows_the_prompt():
    model = fused("llama", veneer.LoReftConfig(r=2, prefix_positions=1, suffix_positions=1), value=False)
    ids = models.inputs("llama")["input_ids"]
    assert edited(model, input_ids=ids) == [[0, 6]] * 3
    assert edited(model, input_ids=ids, prompt_lengths=[2, 3, 4]) == [[0, 1], [0, 2], [0, 3]]
