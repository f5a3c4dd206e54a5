"""Tiny models of each architecture that is exported to GGUF, with tokenizers, saved as a directory.

Sizes are unequal, so that a transposed or swapped dimension cannot pass, and rows are whole blocks of 32, so that each
type of GGUF can store them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
GEMMA = SIZES | dict(num_attention_heads=2, num_key_value_heads=1, head_dim=256, sliding_window=16)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | dict(head_dim=32),
    "llama3": SIZES
    | dict(
        head_dim=32,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=10000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "mistral": SIZES | dict(head_dim=32, sliding_window=None),
    "qwen2": SIZES | dict(tie_word_embeddings=True),
    "qwen3": SIZES | dict(head_dim=128),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | dict(num_hidden_layers=7),
    "phi3": SIZES,
    "smollm3": SIZES | dict(num_hidden_layers=5),
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4, n_positions=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0),
}
"""Settings by name; "llama3" is a Llama with Llama 3's rotary embedding, and biases."""
SENTENCEPIECE = ("mistral", "gemma2", "gemma3_text", "phi3")
"""Models whose tokenizer is one of SentencePiece."""
WORDS = ("the", " the", "12", " 7", "ing", "  ", " a", "été", "\n\n")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def saved(name: str, directory: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Save a model of this name with its tokenizer; returns the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    words = byte_level()
    if name in SENTENCEPIECE:
        words = sentencepiece(prefix=name != "gemma2", strips=name == "phi3")
    settings = CONFIGS[name] | {"vocab_size": len(words)} | settings
    config = AutoConfig.for_model("llama" if name == "llama3" else name, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases at their start would hide an error
                parameter += torch.randn(parameter.shape) * 0.2
            elif key.endswith(("embed_tokens.weight", "wte.weight")):
                parameter *= 10
            else:
                parameter *= 3
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return model


def byte_level(steps: Any = None, words: tuple[str, ...] = WORDS, ignore_merges: bool = False) -> Any:
    """A byte-level BPE with a few words.

    Args:
        steps: the pre-tokenizer as JSON; None: GPT-2's.
    """
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate((*SPECIAL, *letters))}
    merges: list[list[str]] = []
    for word in words:
        shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)[0][0]
        for i in range(1, len(shown)):
            if [shown[:i], shown[i]] not in merges:
                merges.append([shown[:i], shown[i]])
            vocab.setdefault(shown[: i + 1], len(vocab))
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges},
        "pre_tokenizer": bytes_of if steps is None else steps,
        "decoder": bytes_of,
    }
    return _tokenizer(content)


def sentencepiece(prefix: bool = True, strips: bool = False) -> Any:
    """A BPE of SentencePiece's kind, with bytes as a fallback.

    Args:
        prefix: put a space before each text, as Llama 2's does.
        strips: special tokens take the spaces after them, as Phi-3's do.
    """
    pieces = [" t", "he", " the", "in", "ing", " a", "an", " an", "ing a", "th"]
    letters = sorted(set("".join(pieces).replace(" ", "▁") + "bcdefghijklmnopqrstuvwxyzABT.,"))
    vocab = {text: i for i, text in enumerate((*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *letters))}
    for piece in pieces:
        vocab.setdefault(piece.replace(" ", "▁"), len(vocab))
    merges = []
    for piece in pieces:  # as transformers' converter: all pairs that give the piece, in the order of the pieces
        text = piece.replace(" ", "▁")
        pairs = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in vocab and text[i:] in vocab]
        merges += [[*pair] for pair in sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content = {
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": "<unk>",
        },
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if prefix else replace,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    }
    made = _tokenizer(content)
    if strips:
        from transformers import AddedToken

        stripping = [
            AddedToken(text, special=True, rstrip=True, normalized=False) for text in ("<|user|>", "</s>", "<pad>")
        ]
        made.add_special_tokens({"additional_special_tokens": ["<|endoftext|>", *stripping]})
    return made


def _tokenizer(content: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    empty = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "post_processor": None,
    }
    model = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    inner = Tokenizer.from_str(json.dumps(empty | content | {"model": model | content["model"]}))
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = CHAT
    return made


CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
