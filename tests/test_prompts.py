"""Learned prompts in front of the input: where they start, and what grows with them."""

from __future__ import annotations

import copy

import pytest
import torch

from veneer import (
    CartridgeConfig,
    ConfigError,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from veneer.core.state import state_of

from . import models
from .models import perturb

WORDS = ["[UNK]", "say", "yes", "or", "no", "to", "this"]


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer of seven words, on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def prompt_of(model):
    return state_of(model.get_base_model()).prompts["default"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n", [3, 6, 8])
def test_a_text_is_repeated_or_cut_to_length(tokenizer, n: int):
    import peft

    settings = dict(
        num_virtual_tokens=n,
        task_type="CAUSAL_LM",
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="say yes or no",
        tokenizer_name_or_path=tokenizer,
    )
    model = get_peft_model(models.build("llama"), PromptTuningConfig(**settings))
    ids = ([1, 2, 3, 4] * 2)[:n]
    words = models.build("llama").get_input_embeddings().weight
    assert torch.equal(prompt_of(model).prompt_embeddings, words[ids])
    theirs = peft.get_peft_model(models.build("llama"), peft.PromptTuningConfig(**settings))
    assert torch.equal(theirs.prompt_encoder["default"].embedding.weight, words[ids])


def test_a_sampled_vocabulary_is_the_models_own():
    config = PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB")
    model = get_peft_model(models.build("gpt2"), config)
    words = models.build("gpt2").get_input_embeddings().weight
    for row in prompt_of(model).prompt_embeddings:
        assert (words == row).all(-1).any()


def test_a_file_does_not_need_the_tokenizer(tokenizer, tmp_path):
    """The text is where it started; loading reads the values."""
    import shutil

    from veneer import PeftModel

    config = PromptTuningConfig(
        num_virtual_tokens=3,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="yes",
        tokenizer_name_or_path=tokenizer,
    )
    model = models.perturb(get_peft_model(models.build("llama"), config).eval())
    model.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tokenizer)
    loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path / "adapter")
    assert torch.equal(prompt_of(loaded).prompt_embeddings, prompt_of(model).prompt_embeddings)


def test_the_task_is_filled_in_so_that_peft_reads_the_file():
    model = get_peft_model(models.build("llama"), PrefixTuningConfig(num_virtual_tokens=3))
    config = model.active_peft_config
    assert config.task_type == "CAUSAL_LM" and config.num_layers == 2 and config.token_dim == 14


def test_labels_and_mask_grow_with_the_prompt():
    model = get_peft_model(models.build("llama"), PromptTuningConfig(num_virtual_tokens=3)).eval()
    ids, mask = models.inputs("llama")["input_ids"], torch.ones(3, 7, dtype=torch.long)
    out = model(input_ids=ids, attention_mask=mask, labels=ids)
    assert out.logits.shape[1] == 10
    logits = out.logits[:, 2:-1].reshape(-1, 67)  # the prompt's last position already predicts a token
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, ids.reshape(-1)))


def test_the_answer_of_a_question_moves_with_the_prompt():
    torch.manual_seed(0)
    model = get_peft_model(
        models.bert("ForQuestionAnswering"), PromptTuningConfig(num_virtual_tokens=3, task_type="QUESTION_ANS")
    ).eval()
    ids, where = models.inputs("bert")["input_ids"], torch.tensor([0, 2, 5])
    out = model(input_ids=ids, start_positions=where, end_positions=where + 1)
    start = torch.nn.functional.cross_entropy(out.start_logits, where + 3)
    end = torch.nn.functional.cross_entropy(out.end_logits, where + 4)
    torch.testing.assert_close(out.loss, (start + end) / 2)


def test_a_cache_of_the_callers_own_is_filled():
    from transformers import DynamicCache

    model = get_peft_model(models.build("llama"), PrefixTuningConfig(num_virtual_tokens=3)).eval()
    ids, cache = models.inputs("llama")["input_ids"], DynamicCache()
    first = model(input_ids=ids[:, :4], past_key_values=cache).logits
    rest = model(input_ids=ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 10


def test_prefix_heads_follow_grouped_query_attention_and_odd_head_sizes():
    model = get_peft_model(models.build("llama"), PrefixTuningConfig(num_virtual_tokens=3))
    k, v = prompt_of(model).key_values({})[0]
    assert k.shape == v.shape == (1, 3, 14)
    model = get_peft_model(models.t5(d_kv=7), PrefixTuningConfig(num_virtual_tokens=3)).eval()
    batch = models.inputs("t5")
    assert prompt_of(model).key_values({})[0][0].shape == (5, 3, 7)
    assert model(**batch).logits.shape == (3, 5, 67)


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_decoders_prompt_needs_no_rows_for_the_decoder(tmp_path):
    """PEFT's examples say num_transformer_submodules=1: half the rows, and the other half is never read."""
    import peft

    from veneer import PeftModel

    settings = dict(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM", num_transformer_submodules=1)
    theirs = peft.get_peft_model(models.build("t5"), peft.PromptTuningConfig(**settings)).eval()
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(models.build("t5"), tmp_path)
    assert prompt_of(ours).prompt_embeddings.shape == (3, 30)
    batch = models.inputs("t5")
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="num_transformer_submodules = 1"):
        get_peft_model(models.build("t5"), PrefixTuningConfig(**settings))


SEVERAL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=67,
    head_dim=8,
    sliding_window=4,
    layer_types=["sliding_attention", "full_attention"] * 2,
    pad_token_id=0,
)


def gemma4(shared: int):
    """Heads of two sizes; the last layers may read the keys of earlier ones."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    by_layer = dict(hidden_size_per_layer_input=6, vocab_size_per_layer_input=67)
    own = dict(global_head_dim=16, num_kv_shared_layers=shared) | by_layer
    return Gemma4ForCausalLM(Gemma4TextConfig(**SEVERAL | own))


def gemma3n():
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    own = dict(hidden_size_per_layer_input=6, vocab_size_per_layer_input=67, num_kv_shared_layers=2, laurel_rank=3)
    own |= dict(altup_num_inputs=2, altup_active_idx=0, activation_sparsity_pattern=[0.0] * 4)
    return Gemma3nForCausalLM(Gemma3nTextConfig(**SEVERAL | own | dict(intermediate_size=[48] * 4)))


def qwen35():
    """Layers with linear attention among those with full attention."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    own = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
    own |= dict(layer_types=["linear_attention", "full_attention"] * 2)
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SEVERAL | own))


UNEQUAL = {
    "gemma4": lambda: gemma4(0),
    "gemma4 sharing": lambda: gemma4(2),
    "gemma3n": gemma3n,
    "qwen3.5": qwen35,
}


@pytest.mark.parametrize("make", UNEQUAL.values(), ids=UNEQUAL)
@pytest.mark.parametrize("config", [PrefixTuningConfig, CartridgeConfig])
def test_a_prefix_on_layers_whose_caches_differ(config, make, tmp_path):
    """In size, or in that they have one: with the cache as without, acting, and the same when loaded."""
    torch.manual_seed(0)
    base = make().eval()
    settings = dict(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = perturb(get_peft_model(copy.deepcopy(base), config(**settings)), "default", 3).eval()
    ids = torch.tensor([[5, 9, 11, 7, 13]])
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        whole = model(input_ids=ids, use_cache=False).logits
    assert (whole - plain).abs().max() > 1e-3
    written = [model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*written)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, whole)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
