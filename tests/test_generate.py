"""`generate` says what the forward pass says: for every method, with padding, beams, and rows of different adapters."""

from __future__ import annotations

import pytest
import torch

from veneer import LoraConfig, OFTConfig, PrefixTuningConfig, PromptTuningConfig, VeneerError, get_peft_model
from veneer.core.state import state_of

from . import models
from .cases import CASES, Case
from .models import perturb

CAUSAL = [case for case in CASES if case.model in ("llama", "gpt2", "mistral") and case.method != "lily"]
"""But Lily, whose router averages over the tokens of a call: one call for each token is another average."""
SEQ2SEQ = [case for case in CASES if case.model == "t5"]
GREEDY = dict(do_sample=False, max_new_tokens=4, min_new_tokens=4)


def by_hand(model, ids, mask=None, **facts):
    """Greedy decoding by whole forward passes, without a cache."""
    names, n = state_of(model.get_base_model()).fact_names(), ids.shape[1]
    facts |= {"prompt_lengths": [n] * len(ids)} if "prompt_lengths" in names else {}
    for _ in range(GREEDY["max_new_tokens"]):
        logits = model(input_ids=ids, attention_mask=mask, **facts).logits[:, -1].clone()
        logits[:, 2] = -torch.inf  # generate may not end early either
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_greedy_decoding_is_the_forward_pass(case: Case):
    model, ids, facts = case.build(), models.inputs(case.model)["input_ids"], case.facts_of(3)
    assert torch.equal(model.generate(input_ids=ids, **facts, **GREEDY), by_hand(model, ids, **facts))


@pytest.mark.parametrize("case", [c for c in CAUSAL if c.is_prompt or str(c) == "lora-llama"], ids=str)
def test_padding_on_the_left_does_not_matter(case: Case):
    model, ids = case.build(), models.inputs(case.model)["input_ids"]
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], dim=1)
    mask = (padded > 0).long()
    with_padding = model.generate(input_ids=padded, attention_mask=mask, **case.facts_of(3), **GREEDY)
    assert torch.equal(with_padding[:, 2:], model.generate(input_ids=ids, **case.facts_of(3), **GREEDY))


@pytest.mark.parametrize("case", [c for c in CAUSAL if c.method in ("lora", "prefix_tuning", "prompt_tuning")], ids=str)
def test_the_cache_and_no_cache_agree(case: Case):
    model, ids = case.build(), models.inputs(case.model)["input_ids"]
    cached = model.generate(input_ids=ids, **GREEDY)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **GREEDY), cached)


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_of_different_adapters(beams: int):
    model = get_peft_model(models.build("llama"), LoraConfig(r=4), "one").eval()
    model.add_adapter("two", LoraConfig(r=3, target_modules=["down_proj"]))
    perturb(perturb(model, "one", 3, 0.5), "two", 4, 0.5)
    ids = models.inputs("llama", rows=4)["input_ids"]
    names = ["one", "two", "__base__", "one"]
    mixed = model.generate(input_ids=ids, adapter_names=names, num_beams=beams, **GREEDY)
    rows = []
    for row, name in enumerate(names):
        model.set_adapter("one" if name == "__base__" else name)
        with model.disable_adapter() if name == "__base__" else torch.no_grad():
            rows.append(model.generate(input_ids=ids[row : row + 1], num_beams=beams, **GREEDY))
    assert torch.equal(mixed, torch.cat(rows))
    assert len({tuple(r[0].tolist()[-4:]) for r in rows}) > 2


@pytest.mark.parametrize("beams", [1, 2])
def test_an_encoder_decoder_generates_mixed_rows(beams: int):
    """Its encoder is called past the model's own forward; the rows must reach it all the same."""
    model = get_peft_model(models.build("t5"), LoraConfig(r=4), "one").eval()
    model.add_adapter("two", LoraConfig(r=3, target_modules=["wo", "k"]))
    perturb(perturb(model, "one", 3, 0.5), "two", 4, 0.5)
    ids, names = models.inputs("t5", rows=3)["input_ids"], ["two", "one", "__base__"]
    settings = dict(num_beams=beams, output_scores=True, return_dict_in_generate=True, **GREEDY)
    mixed = model.generate(input_ids=ids, adapter_names=names, **settings)
    for row, name in enumerate(names):
        model.set_adapter("one" if name == "__base__" else name)
        with model.disable_adapter() if name == "__base__" else torch.no_grad():
            alone = model.generate(input_ids=ids[row : row + 1], **settings)
        torch.testing.assert_close(mixed.scores[0][row * beams], alone.scores[0][0], rtol=1e-4, atol=1e-4)
        assert torch.equal(mixed.sequences[row], alone.sequences[0])


@pytest.mark.parametrize("case", SEQ2SEQ, ids=str)
def test_an_encoder_decoder_generates_with_a_prompt(case: Case):
    model, ids, facts = case.build(), models.inputs("t5")["input_ids"], case.facts_of(3)
    model.base_model.model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    found = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=4, **facts)
    steps = torch.zeros(3, 1, dtype=torch.long)
    for _ in range(4):
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=steps, **facts).logits[:, -1]
        steps = torch.cat([steps, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, steps)


@pytest.mark.parametrize("outer", [LoraConfig(r=3), OFTConfig(oft_block_size=5, target_modules=["q_proj"])])
def test_a_row_may_use_several_adapters(outer):
    """Innermost first, as with `set_adapter`; beside rows with one of them and with none."""
    model = get_peft_model(models.build("llama"), LoraConfig(r=4), "one").eval()
    model.add_adapter("two", outer)
    perturb(perturb(model, "one", 3, 0.5), "two", 4, 0.5)
    ids = models.inputs("llama", rows=5)["input_ids"]
    names = [("one", "two"), "two", "__base__", ("two", "one"), "one"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        for row, name in enumerate(names):
            model.set_adapter("one" if name == "__base__" else name)
            with model.disable_adapter() if name == "__base__" else torch.no_grad():
                alone = model(input_ids=ids[row : row + 1]).logits
            torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(VeneerError, match="no adapter is called 'three'"):
        model(input_ids=ids, adapter_names=[("one", "three"), *names[1:]])


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig], ids=lambda c: c.peft_type)
def test_a_static_cache_is_refused_for_prefixes(config):
    model = get_peft_model(models.build("llama"), config(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    ids = models.inputs("llama")["input_ids"]
    with pytest.raises(VeneerError, match="static cache"):
        model.generate(input_ids=ids, cache_implementation="static", **GREEDY)


def test_lora_takes_a_static_cache():
    model, ids = CASES[0].build(), models.inputs("llama")["input_ids"]
    assert torch.equal(
        model.generate(input_ids=ids, cache_implementation="static", **GREEDY), model.generate(input_ids=ids, **GREEDY)
    )


def test_several_sequences_a_row_keep_their_adapter():
    model = get_peft_model(models.build("llama"), LoraConfig(r=4), "one").eval()
    perturb(model, "one", 3, 0.5)
    ids = models.inputs("llama", rows=2)["input_ids"]
    settings = dict(max_new_tokens=3, do_sample=False, num_beams=4, num_return_sequences=2)
    found = model.generate(input_ids=ids, adapter_names=["__base__", "one"], **settings)
    alone = model.generate(input_ids=ids[1:], **settings)
    assert torch.equal(found[2:], alone)


def test_prompts_and_layers_work_together():
    """A prompt and LoRA on one model: active together, the forward pass and generate agree."""
    model = get_peft_model(models.build("llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "p")
    model.add_adapter("l", LoraConfig(r=4))
    perturb(perturb(model.eval(), "p", 3), "l", 4)
    model.set_adapter(["p", "l"])
    ids = models.inputs("llama")["input_ids"]
    assert torch.equal(model.generate(input_ids=ids, **GREEDY), by_hand(model, ids))
    assert model(input_ids=ids).logits.shape[1] == ids.shape[1] + 3


def test_a_mixed_batch_that_fails_leaves_nothing_behind():
    """The rows of the failed batch must not reach the next call's facts."""
    case = next(c for c in CASES if c.method == "xlora")
    model, batch = case.build(), case.inputs(rows=4)
    expected = model(**batch).logits
    layer = next(iter(state_of(model.get_base_model()).layers.values()))
    whole, layer.adapters["default"].post = layer.adapters["default"].post, None
    with pytest.raises(TypeError):
        model(**batch, adapter_names=["default", "__base__", "__base__", "default"])
    layer.adapters["default"].post = whole
    assert torch.equal(model(**batch).logits, expected)
