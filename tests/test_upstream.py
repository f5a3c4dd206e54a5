"""What veneer knows of the insides of transformers holds for the release that is installed."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM, Trainer

from veneer import (
    CartridgeConfig,
    CPTConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShadowConfig,
    VeneerError,
    get_peft_model,
)
from veneer.train.trainer import ExactTrainer
from veneer.upstream import cache as caches
from veneer.upstream import checkpointing
from veneer.upstream.calls import parameters
from veneer.upstream.positions import places_of

from . import models
from .models import perturb


def mamba():
    torch.manual_seed(0)
    sizes = dict(hidden_size=30, num_hidden_layers=2, vocab_size=67, state_size=5, time_step_rank=3)
    return lively(MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)))


def rwkv():
    torch.manual_seed(0)
    sizes = dict(hidden_size=30, attention_hidden_size=30, intermediate_size=45, num_hidden_layers=2, vocab_size=67)
    return lively(RwkvForCausalLM(RwkvConfig(**sizes, context_length=64, bos_token_id=1, eos_token_id=2)))


def lively(model):
    """With linear layers and embeddings large enough for what comes before to show in the output."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(std=0.25)
    return model.eval()


BUILDERS = {"llama": lambda: models.build("llama"), "gpt2": lambda: models.build("gpt2"), "mamba": mamba, "rwkv": rwkv}
IDS = torch.tensor([[5, 9, 50, 51, 7, 3], [8, 50, 51, 4, 6, 12]])
GREEDY = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
IN_FRONT = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "cpt": CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 2]
    ),
    "alora": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, alora_invocation_tokens=[50, 51]),
}
IN_CACHE = {
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "cartridge": CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "shadow": ShadowConfig(task_type="CAUSAL_LM"),
}
PAIRS = [(method, name) for method in IN_FRONT for name in BUILDERS]
PAIRS += [(method, name) for method in IN_CACHE for name in ("llama", "gpt2")]


def adapted(method: str, name: str):
    config = copy.copy({**IN_FRONT, **IN_CACHE}[method])
    if method == "alora" and name == "mamba":
        config.target_modules = ["in_proj", "x_proj"]  # its kernels read the other weights without running the module
    return perturb(get_peft_model(BUILDERS[name](), config), scale=0.5).eval()


@pytest.mark.parametrize(("method", "name"), PAIRS, ids=str)
def test_generation_is_the_same_with_a_cache_and_without(method: str, name: str):
    """A cache under a name that is not known goes unseen, and a prompt is put in front of every token."""
    if name == "rwkv" and method == "alora":
        pytest.skip("RWKV's cache is a list of tensors, which carries no note of the rows that were invoked")
    model = adapted(method, name)
    ids = IDS[:1] if name == "rwkv" else IDS  # its steps of one token mix the rows of a batch, adapter or not
    mask = {} if name == "rwkv" else {"attention_mask": torch.ones_like(ids)}
    cached = model.generate(input_ids=ids, **mask, **GREEDY)
    plain = whole_sequences(model, ids) if name == "rwkv" else model.generate(ids, **mask, **GREEDY, use_cache=False)
    assert torch.equal(cached, plain)
    last = model(input_ids=ids, use_cache=False).logits[:, -1]
    with model.disable_adapter():
        without = model(input_ids=ids, use_cache=False).logits[:, -1]
    assert (last - without).abs().max() > 0.01, "the adapter does something"


def whole_sequences(model, ids):
    """What `generate(use_cache=False)` gives; RWKV's gives each step the last token alone, without a state."""
    for _ in range(GREEDY["max_new_tokens"]):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf  # no end before min_new_tokens
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
@pytest.mark.parametrize("given", ["past_key_values", "cache"])
def test_both_names_of_the_cache_are_taken_where_the_model_takes_them(method: str, given: str):
    """From transformers 5.24 on a model takes the old name too; before it knows that alone."""
    model, cache = adapted(method, "llama"), DynamicCache()
    if given == "cache" and caches.argument(model.get_base_model()) != "cache":
        pytest.skip("this transformers does not know the new name")
    first = model(input_ids=IDS[:, :4], **{given: cache}, use_cache=True)
    rest = model(input_ids=IDS[:, 4:], **{given: cache}, use_cache=True)
    whole = model(input_ids=IDS, use_cache=False).logits[:, -2:]
    torch.testing.assert_close(rest.logits, whole, rtol=1e-4, atol=1e-5)
    assert caches.of_output(first) is cache and caches.length(cache) == 9


def test_positional_arguments_go_where_the_model_has_them():
    """A prompt names them all: one that stayed behind would take the place of the input."""
    model, mask = adapted("prompt tuning", "llama"), torch.ones_like(IDS)
    mask[0, :2] = 0
    named = model(input_ids=IDS, attention_mask=mask).logits
    assert torch.equal(model.get_base_model()(IDS, mask).logits, named)
    assert not torch.equal(model(input_ids=IDS).logits, named)


@pytest.mark.parametrize("name", BUILDERS)
def test_what_a_cache_holds(name: str):
    model = BUILDERS[name]()
    assert caches.argument(model) is not None
    assert not caches.is_filled(None) and caches.length(None) == 0
    out = model(input_ids=IDS, use_cache=True)
    cache = caches.of_output(out)
    assert caches.is_filled(cache) and caches.of_output(tuple(out.values())) is (cache if name != "rwkv" else None)
    assert caches.length(cache) == (6 if name in ("llama", "gpt2") else None)
    assert caches.of_call({"input_ids": IDS, caches.argument(model): cache}) is cache


def test_an_empty_recurrent_cache_is_not_filled():
    model = mamba()
    cache = caches.new(model, is_encoder_decoder=False)
    assert not caches.is_filled(cache) and caches.length(cache) == 0


def test_places_in_a_cache_that_does_not_count():
    model = mamba()
    cache = caches.of_output(model(input_ids=IDS[:, :4], use_cache=True))
    call = {"input_ids": IDS[:, 4:], caches.argument(model): cache}
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    assert places_of({**call, "attention_mask": mask}).tolist() == [[3, 4], [4, 5]]
    with pytest.raises(VeneerError, match="attention_mask"):
        places_of(call)


def test_a_model_without_a_cache_refuses_a_prefix():
    with pytest.raises(VeneerError, match="cache"):
        get_peft_model(models.bert("ForSequenceClassification"), PrefixTuningConfig(num_virtual_tokens=3))
    with pytest.raises(VeneerError, match="takes no cache"):
        caches.with_cache({}, caches.argument(nn.Linear(2, 2)), DynamicCache())


def test_names_of_arguments_are_found_below_decorators():
    import functools

    model = models.build("llama")
    before = parameters(model)
    assert before[:2] == ("input_ids", "attention_mask") and "kwargs" not in before
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        return inner(*args, **kwargs)

    model.forward = forward
    assert parameters(model) == before


def test_checkpointing_is_seen_and_set():
    model = models.build("llama")
    assert not checkpointing.is_on(model)
    checkpointing.enable(model, {"use_reentrant": False})
    assert checkpointing.is_on(model)


def test_what_the_trainer_overrides_is_there():
    """A private method of `Trainer` that is renamed would leave ours uncalled, and the run inexact in silence."""
    own = [name for name, value in vars(ExactTrainer).items() if inspect.isfunction(value)]
    helpers = {"_hopeless", "continued", "_is_over", "_mean_terms", "_parts"}  # ours alone
    overridden = {name for name in own if not name.startswith("__") and name not in helpers}
    missing = sorted(name for name in overridden if not hasattr(Trainer, name))
    assert not missing
