"""Small models with random weights, in a cache as of the hub, under the names that PEFT's tests ask for."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WORDS = 512
TOKENS = dict(vocab_size=WORDS, pad_token_id=1, bos_token_id=0, eos_token_id=2)
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
LLAMA = dict(**TOKENS, **SIZES, intermediate_size=64, max_position_embeddings=2048)
GROUPED = dict(**LLAMA, num_key_value_heads=2)
GPT = dict(**TOKENS, n_embd=32, n_layer=5, n_head=4)
BERT = dict(**TOKENS, **SIZES, intermediate_size=37)
OPT = dict(**TOKENS, num_attention_heads=4, max_position_embeddings=2048)
T5 = dict(
    vocab_size=WORDS, pad_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4,
)  # fmt: skip
BART = dict(
    d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=4, decoder_ffn_dim=4, decoder_start_token_id=2,
)  # fmt: skip
SMALL_OPT = OPT | dict(hidden_size=16, ffn_dim=4, num_hidden_layers=5, word_embed_proj_dim=16)

KINDS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("OPTForCausalLM", "OPTConfig", "peft-internal-testing/tiny-random-OPTForCausalLM facebook/opt-125m", SMALL_OPT),
    ("OPTForCausalLM", "OPTConfig", "hf-internal-testing/tiny-random-OPTForCausalLM facebook/opt-350m", SMALL_OPT),
    (
        *("OPTForCausalLM", "OPTConfig", "peft-internal-testing/opt-125m"),
        OPT | dict(hidden_size=64, ffn_dim=128, num_hidden_layers=12, word_embed_proj_dim=64),
    ),
    (
        *("GPT2LMHeadModel", "GPT2Config"),
        "peft-internal-testing/tiny-random-gpt2 hf-internal-testing/tiny-random-gpt2 gpt2 openai-community/gpt2 "
        "peft-internal-testing/tiny-random-GPT2LMHeadModel",
        GPT,
    ),
    (
        *("LlamaForCausalLM", "LlamaConfig"),
        "trl-internal-testing/tiny-random-LlamaForCausalLM peft-internal-testing/tiny-random-LlamaForCausalLM "
        "hf-internal-testing/tiny-random-LlamaForCausalLM",
        LLAMA,
    ),
    ("MistralForCausalLM", "MistralConfig", "hf-internal-testing/tiny-random-MistralForCausalLM", GROUPED),
    (
        *("Gemma3ForCausalLM", "Gemma3TextConfig", "hf-internal-testing/tiny-random-Gemma3ForCausalLM"),
        GROUPED | dict(head_dim=8),
    ),
    (
        *("GptOssForCausalLM", "GptOssConfig", "trl-internal-testing/tiny-GptOssForCausalLM"),
        GROUPED | dict(head_dim=8, num_local_experts=4),
    ),
    (
        *("Qwen3MoeForCausalLM", "Qwen3MoeConfig", "trl-internal-testing/tiny-Qwen3MoeForCausalLM"),
        GROUPED | dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    ),
    ("MixtralForCausalLM", "MixtralConfig", "hf-internal-testing/Mixtral-tiny", GROUPED | dict(num_local_experts=4)),
    (
        *("Llama4ForCausalLM", "Llama4TextConfig", "trl-internal-testing/tiny-Llama4ForCausalLM"),
        GROUPED | dict(intermediate_size_mlp=64, head_dim=8, num_local_experts=4),
    ),
    (
        *("Qwen2ForCausalLM", "Qwen2Config"),
        "peft-internal-testing/tiny-dummy-qwen2 trl-internal-testing/tiny-Qwen2ForCausalLM-2.5 Qwen/Qwen2-0.5B",
        GROUPED,
    ),
    ("Qwen3ForCausalLM", "Qwen3Config", "trl-internal-testing/tiny-Qwen3ForCausalLM", GROUPED | dict(head_dim=8)),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", "peft-internal-testing/tiny-random-GPTNeoXForCausalLM", BERT),
    ("GPTJForCausalLM", "GPTJConfig", "peft-internal-testing/tiny-random-GPTJForCausalLM", GPT | dict(rotary_dim=4)),
    ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", "peft-internal-testing/tiny-random-GPTBigCodeForCausalLM", GPT),
    (
        *("BloomForCausalLM", "BloomConfig", "peft-internal-testing/tiny-random-BloomForCausalLM"),
        dict(**TOKENS, hidden_size=32, n_layer=5, n_head=4),
    ),
    (
        *("BertModel", "BertConfig"),
        "peft-internal-testing/tiny-random-BertModel hf-internal-testing/tiny-random-BertModel bert-base-uncased",
        BERT,
    ),
    ("RobertaModel", "RobertaConfig", "peft-internal-testing/tiny-random-RobertaModel", BERT),
    ("DebertaModel", "DebertaConfig", "peft-internal-testing/tiny-random-DebertaModel", BERT),
    ("DebertaV2Model", "DebertaV2Config", "peft-internal-testing/tiny-random-DebertaV2Model", BERT),
    (
        *("BertForSequenceClassification", "BertConfig"),
        "peft-internal-testing/tiny-random-BertForSequenceClassification",
        BERT,
    ),
    (
        *("RobertaForSequenceClassification", "RobertaConfig"),
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification",
        BERT,
    ),
    (
        *("LlamaForSequenceClassification", "LlamaConfig"),
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",
        LLAMA,
    ),
    (
        *("T5ForConditionalGeneration", "T5Config"),
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration google/flan-t5-small google/flan-t5-base "
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated peft-internal-testing/tiny-random-t5",
        T5,
    ),
    (
        *("BartForConditionalGeneration", "BartConfig"),
        "peft-internal-testing/tiny-random-BartForConditionalGeneration",
        TOKENS | BART,
    ),
]
"""(class, config's class, names on the hub, sizes)."""


def tokenizer() -> Any:
    """A token for each byte."""
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), len(special))}
    made = Tokenizer(models.BPE(special | letters, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    roles = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", mask_token="<unk>")
    return t.PreTrainedTokenizerFast(tokenizer_object=made, cls_token="<s>", sep_token="</s>", **roles)


def place(name: str) -> Path:
    """The folder that the hub's cache has for the newest revision of a model."""
    revision = hashlib.sha1(name.encode()).hexdigest()
    home = Path(os.environ["HF_HOME"]) / "hub" / ("models--" + name.replace("/", "--"))
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(revision)
    return home / "snapshots" / revision


def main() -> None:
    for model, config, names, sizes in KINDS:
        for name in names.split():
            torch.manual_seed(0)
            getattr(t, model)(getattr(t, config)(**sizes)).save_pretrained(place(name))
            tokenizer().save_pretrained(place(name))


if __name__ == "__main__":
    main()
