"""A sample of `make architectures`: one model class for each way in which architectures differ."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import nn

from veneer import ConfigError, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from veneer.core import trial

from .architectures import tiny
from .architectures.checks import CHECKS, outcome
from .room import ROOT

SAMPLE = {
    "BartForConditionalGeneration": "encoder and decoder",
    "BloomForCausalLM": "one matrix for queries, keys and values, and no positions",
    "DeepseekV3ForCausalLM": "latent attention and experts",
    "FalconForCausalLM": "one key for all heads",
    "Gemma3ForConditionalGeneration": "pictures and text",
    "Gemma4ForCausalLM": "an embedding for each layer, and keys of unlike sizes",
    "GPTBigCodeForCausalLM": "one key for all heads, in one matrix with the queries",
    "HrmTextForCausalLM": "layers that run several times",
    "JambaForCausalLM": "attention and recurrent layers",
    "Lfm2ForCausalLM": "attention and convolutions",
    "MambaForCausalLM": "recurrent layers alone",
    "MiniMaxForCausalLM": "a cache of its own",
    "PhimoeForCausalLM": "routers that draw",
    "Qwen3_5ForCausalLM": "linear attention",
    "RemBertForCausalLM": "embeddings of another width",
    "T5ForConditionalGeneration": "relative positions",
}


def build(name: str) -> nn.Module:
    if name not in tiny.classes():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return tiny.build(name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_all_checks_hold_or_are_refused(name: str):
    build(name)
    outcomes = {}
    for check, function in CHECKS.items():
        outcomes[check] = outcome(function, lambda: tiny.build(name))
    assert not {check: why for check, (kind, why) in outcomes.items() if kind == "fault"}
    found = json.loads((ROOT / "docs" / "architectures.json").read_text())
    if found["transformers"] == transformers.__version__:
        (row,) = (row for row in found["architectures"] if row["class"] == name)
        kinds = {check: kind for check, (kind, _) in outcomes.items()}
        assert kinds == {check: kind for check, (kind, _) in row["checks"].items()}, "make architectures"


def test_the_page_counts_no_faults():
    found = json.loads((ROOT / "docs" / "architectures.json").read_text())
    outcomes = [kind for row in found["architectures"] for kind, _ in row["checks"].values()]
    assert len(outcomes) > 2000 and "fault" not in outcomes


@pytest.mark.parametrize(
    ("config_class", "name"),
    [(PrefixTuningConfig, "DeepseekV3ForCausalLM"), (PromptTuningConfig, "Gemma4ForCausalLM")],
)
def test_what_cannot_take_a_prompt_is_refused_when_it_is_attached(config_class, name: str, monkeypatch):
    """The model's own code is what knows: without the trial, its error comes with the first batch."""
    model = build(name)
    config = config_class(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ConfigError, match=f"cannot be used on {name}: calling the model with it fails"):
        get_peft_model(model, config)
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    monkeypatch.setattr(trial, "check", lambda *args: None)
    adapted = get_peft_model(tiny.build(name), config)
    with pytest.raises((RuntimeError, IndexError)):
        adapted(input_ids=ids)


def test_a_trial_leaves_no_trace():
    model = build("LlamaForCausalLM").train()
    calls = []
    model.register_forward_hook(lambda *args: calls.append(model.training))
    model.model.norm.eval()
    adapted = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    state = torch.get_rng_state()
    trial.check(model, adapted._state, "default")
    assert torch.equal(torch.get_rng_state(), state)
    assert calls and not any(calls), "the trial ran, in evaluation mode"
    assert model.training and not model.model.norm.training
    assert adapted.active_adapters == ["default"]
    assert not any(parameter.grad is not None for parameter in adapted.parameters())


def test_a_prompt_from_a_file_is_tried_when_it_is_loaded(tmp_path, monkeypatch):
    """And not again when the present adapter gets other values."""
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    get_peft_model(build("LlamaForCausalLM"), config).save_pretrained(tmp_path)
    tried = []
    monkeypatch.setattr(trial, "check", lambda model, state, name: tried.append(name))
    loaded = PeftModel.from_pretrained(build("LlamaForCausalLM"), tmp_path)
    assert tried == ["default"]
    loaded.load_adapter(tmp_path, "default")
    assert tried == ["default"]


def test_a_model_that_needs_other_inputs_is_not_judged_by_tokens():
    """What fails without the adapter too says nothing of the adapter."""
    model = build("LlamaForCausalLM")
    inner = model.forward

    def forward(input_ids=None, pixels=None, **kwargs):
        if pixels is None:
            raise ValueError("pixels are missing")
        return inner(input_ids=input_ids, **kwargs)

    model.forward = forward
    adapted = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="pixels"):
        adapted(input_ids=torch.tensor([[5, 6]]))
