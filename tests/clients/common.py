"""What the flows share: veneer as peft, a small language model, a tokenizer, and rows of text."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

import veneer

veneer.install_as_peft()

import torch

torch.set_num_threads(1)
WORDS = [f"w{i}" for i in range(40)]


def folder() -> Path:
    return Path(sys.argv[1])


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **names)


def language_model() -> str:
    """The directory of a small Llama and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    config = LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    path = str(folder() / "base")
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def sentence(i: int) -> str:
    return " ".join(WORDS[(i * 7 + j * 3) % 40] for j in range(6))


def adapters(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def moved(before: dict[str, torch.Tensor], model) -> bool:
    after = adapters(model)
    assert before.keys() == after.keys()
    return any(not torch.equal(before[name], after[name]) for name in before)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)
