"""Merging: one rounding, exact unmerging, tied weights untied, and what is left is a plain transformers model."""

from __future__ import annotations

import pytest
import torch

from veneer import (
    BOFTConfig,
    LoHaConfig,
    LoraConfig,
    NotMergeable,
    OFTConfig,
    VeneerError,
    get_peft_model,
    merge_report,
)
from veneer.core.adapter import Replace
from veneer.core.state import state_of

from . import models
from .cases import MERGEABLE, ONE_EACH, Case
from .models import output, perturb


def lora(model="llama", dtype=torch.float32, **settings):
    settings = dict(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"]) | settings
    return perturb(get_peft_model(models.build(model, dtype=dtype), LoraConfig(**settings)).eval())


def test_merge_and_unload_gives_the_plain_model():
    model, batch = lora(), models.inputs("llama")
    active = output(model, batch)
    merged = model.merge_and_unload()
    assert type(merged) is type(models.build("llama"))
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in models.build("llama").named_parameters()]
    torch.testing.assert_close(output(merged, batch), active, rtol=1e-4, atol=1e-5)


def test_a_half_precision_merge_rounds_once():
    model = lora(dtype=torch.bfloat16)
    layer = next(iter(state_of(model.get_base_model()).layers.values()))
    exact = layer.base_layer.weight.double() + layer.adapters["default"].delta().double()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, exact.float().to(torch.bfloat16))


def test_merging_a_tied_embedding_unties_it(tmp_path):
    from transformers import AutoModelForCausalLM

    model, batch = lora("gpt2", target_modules=["wte"]), models.inputs("gpt2")
    active = output(model, batch)
    head = model.get_output_embeddings().weight.clone()
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, batch), active, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.lm_head.weight, head) and not torch.equal(merged.transformer.wte.weight, head)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(output(again, batch), active, rtol=1e-4, atol=1e-5)


def test_a_tied_embedding_that_is_not_touched_stays_tied():
    merged = lora("gpt2", target_modules=["c_attn"]).merge_and_unload()
    assert merged.config.tie_word_embeddings is True
    assert merged.lm_head.weight is merged.transformer.wte.weight


def test_unmerging_a_tied_embedding_ties_it_again():
    model = lora("gpt2", target_modules=["wte"])
    model.merge_adapter()
    model.unmerge_adapter()
    base = model.get_base_model()
    assert base.lm_head.weight is base.transformer.wte.base_layer.weight


def test_one_of_two_sums_may_be_merged_in_any_order():
    model, batch = lora(), models.inputs("llama")
    model.add_adapter("two", LoraConfig(r=3, target_modules=["down_proj"]))
    perturb(model, "two", 4)
    model.set_adapter(["default", "two"])
    active = output(model, batch)
    model.merge_adapter(["two"])
    assert {layer.merged_adapters for layer in state_of(model.get_base_model()).layers.values()} == {(), ("two",)}
    torch.testing.assert_close(output(model, batch), active, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(output(model, batch), active, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(output(model, batch), active)


def test_values_that_are_not_finite_are_not_merged():
    model = lora()
    first, *_, layer = state_of(model.get_base_model()).layers.values()
    weight = first.base_layer.weight
    with torch.no_grad():
        layer.adapters["default"].lora_B.weight[0, 0] = torch.inf
    with pytest.raises(NotMergeable, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert first.base_layer.weight is weight
    assert not any(one.merged_adapters for one in state_of(model.get_base_model()).layers.values())


def test_switching_while_merged_is_refused():
    model = lora()
    model.add_adapter("two", LoraConfig(r=3))
    model.merge_adapter()
    with pytest.raises(VeneerError, match="unmerge_adapter"):
        model.set_adapter("two")
    with pytest.raises(VeneerError, match="unmerge_adapter"):
        model.delete_adapter("default")


def test_a_replaced_block_merges_and_comes_back():
    """A whole module trained by `modules_to_save` takes the place of the old one."""
    torch.manual_seed(0)
    base = models.bert("ForSequenceClassification").eval()
    pooler = base.bert.pooler
    model = perturb(get_peft_model(base, LoraConfig(r=4, task_type="SEQ_CLS", modules_to_save=["pooler"])).eval())
    batch = {"input_ids": torch.randint(3, 67, (3, 7))}
    active = output(model, batch)
    model.merge_adapter()
    torch.testing.assert_close(output(model, batch), active, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(output(model, batch), active)
    assert base.bert.pooler.base_layer is pooler
    merged = model.merge_and_unload()
    assert type(merged.bert.pooler) is type(pooler) and merged.bert.pooler is not pooler
    torch.testing.assert_close(output(merged, batch), active, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in ONE_EACH if c in MERGEABLE and not c.siblings], ids=str)
def test_fifty_cycles_change_nothing(case: Case):
    """Of every method; each in one of the three dtypes, in turn."""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[ONE_EACH.index(case) % 3]
    model = case.build(dtype=dtype)
    before = [p.clone() for p in model.parameters()]
    for _ in range(50):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in ONE_EACH if c in MERGEABLE and c.model == "llama"], ids=str)
def test_a_merged_weight_is_the_exact_one_rounded_once(case: Case, dtype: torch.dtype):
    """Each entry lies within half a unit in the last place of the sum in fp32, but for the order of that sum."""
    model = case.build(dtype=dtype)
    names = list(state_of(model.get_base_model()).active)
    for layer in state_of(model.get_base_model()).layers.values():
        stack = [part for part in layer.stack(names) if part.has_fold]
        if not stack or stack[0].target.kind == "block" or any(isinstance(p, Replace) for p in stack):
            continue
        W, b = stack[0].target.weight().float(), stack[0].target.bias()
        b = None if b is None else b.float()
        for part in stack:
            W, b = part.fold(W, b)
        merged = layer.fold(stack)[0].float()
        unit = torch.finfo(dtype).eps * torch.maximum(W.abs(), merged.abs()).clamp_min(torch.finfo(dtype).tiny)
        assert ((merged - W).abs() <= 0.5001 * unit).all()


def test_some_of_several_may_be_merged_and_the_others_stay_active():
    model, batch = lora(), models.inputs("llama")
    for i, name in enumerate(("two", "three")):
        model.add_adapter(name, LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
        perturb(model, name, 4 + i)
    model.set_adapter(["default", "two", "three"])
    active = output(model, batch)
    model.merge_adapter(["default", "three"])
    assert model.active_adapters == ["default", "two", "three"]
    torch.testing.assert_close(output(model, batch), active, rtol=1e-4, atol=1e-5)
    before = output(model, batch)
    with torch.no_grad():
        next(state_of(model.get_base_model()).parameters("two")).zero_()
    assert not torch.equal(output(model, batch), before), "the one that was not merged still acts"


def test_the_report_says_what_rounding_takes():
    """Against the merge itself; in fp32 next to nothing, in bf16 a part, of a small update most."""
    shares = []
    for dtype, scale in ((torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.bfloat16, 1e-3)):
        model = lora(dtype=dtype, lora_alpha=16)
        with torch.no_grad():
            for adapter in state_of(model.get_base_model()).adapters("default").values():
                adapter.lora_B.weight.mul_(scale)
        report = merge_report(model)
        layers = state_of(model.get_base_model()).layers
        before = {
            path: (layer.target.weight().float(), layer.adapters["default"].delta()) for path, layer in layers.items()
        }
        model.merge_adapter()
        for one in report.layers:
            W, dW = before[one.path]
            gone = layers[one.path].target.weight().float() - W - dW
            assert one.norm == pytest.approx(float(dW.norm()), rel=1e-3)
            assert one.lost == pytest.approx(float(gone.norm()), rel=1e-2, abs=1e-4)
        shares.append(report.share)
    assert shares[0] < 1e-5 < 1e-3 < shares[1] < 0.1 < 0.5 < shares[2]
    with pytest.raises(VeneerError, match="unmerge_adapter"):
        merge_report(model)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_a_merged_copy_of_a_module_has_the_dtype_of_the_old_one(how: str):
    """It is trained in fp32; a model of two dtypes would not run."""
    model = lora(dtype=torch.bfloat16, modules_to_save=["o_proj"])
    batch, active = models.inputs("llama"), output(model, models.inputs("llama"))
    merged = getattr(model, how)() or model
    base = merged if how == "merge_and_unload" else merged.get_base_model()
    assert base.model.layers[0].self_attn.o_proj.weight.dtype == torch.bfloat16
    torch.testing.assert_close(output(merged, batch), active, rtol=0.1, atol=0.1)


RANDOM = [
    BOFTConfig(target_modules=["q_proj"], boft_block_size=5, boft_dropout=0.6, init_weights=False),
    OFTConfig(target_modules=["q_proj"], oft_block_size=5, module_dropout=0.6, init_weights=False),
    LoHaConfig(target_modules=["q_proj"], r=3, rank_dropout=0.6, init_weights=False),
]


@pytest.mark.parametrize("config", RANDOM, ids=lambda config: config.peft_type)
def test_merging_leaves_out_what_training_draws(config):
    """A merge of a model that is in training is that of the same model in evaluation."""
    model = get_peft_model(models.build("llama"), config)
    merged = []
    for mode in (True, False):
        model.train(mode).merge_adapter()
        assert model.training is mode and all(m.training is mode for m in model.modules())
        merged.append({name: p.clone() for name, p in model.get_base_model().named_parameters()})
        model.unmerge_adapter()
    assert all(torch.equal(merged[0][name], p) for name, p in merged[1].items())


def test_an_in_place_merge_keeps_the_parameters_and_leaves_the_file_alone(tmp_path):
    """The weights may be mapped from a file: the merged ones are in new memory, in the same Parameters."""
    models.build("gpt2").save_pretrained(tmp_path)
    base = models.build("gpt2").from_pretrained(tmp_path)
    weights = {name: (p, p.detach().clone(), p.data_ptr()) for name, p in base.named_parameters()}
    model = perturb(get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"])).eval())
    active = output(model, models.inputs("gpt2"))
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, models.inputs("gpt2")), active, rtol=1e-4, atol=1e-5)
    for name, p in merged.named_parameters():
        before, values, place = weights[name]
        assert p is before and p.is_contiguous()
        assert torch.equal(p, values) is (p.data_ptr() == place) is ("c_attn.weight" not in name)
