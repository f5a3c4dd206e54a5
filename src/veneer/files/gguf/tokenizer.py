"""The tokenizer in a GGUF file, as one of the `tokenizers` library: the inverse of `vocabulary.py`.

transformers' own loader chooses a class of tokenizers, which adds tokens that the file does not have, and splits text
as GPT-2 does where it does not know the name of the pre-tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ...errors import CheckpointError, ConfigError, first_line, nearest, printable
from .reader import Source
from .vocabulary import BYTES, DIGITS, PHI3_KEEPS, PRE_TOKENIZERS, SPACE, WORDS

OTHER_NAMES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "pixtral": "llama-bpe",
    "smaug-bpe": "dbrx",
    "deepseek-r1-qwen": "qwen2",
    "phi-2": "gpt-2",
    "llama4": "gpt-4o",
}
"""Further names that llama.cpp has for the pre-tokenizers in `PRE_TOKENIZERS`."""
SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "mask_token": "mask",
}
"""llama.cpp's names of special tokens, misspelt one included."""
TEMPLATE = "tokenizer.chat_template"


def tokenizer_of(source: Source, longest: int) -> Any:
    """The tokenizer in a file, with its chat template.

    Args:
        longest: tokens that a sequence may have.

    Raises:
        ConfigError: the file has no tokenizer, or one that cannot be built.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    words = _Words(source)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": words.added(),
        "post_processor": words.post_processor(),
    }
    content |= words.sentencepiece() if words.model == "llama" else words.byte_level()
    special = {name: words.tokens[token] for name, token in words.special.items()}
    try:
        backend = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises no other class
        raise CheckpointError(f"the tokenizer in {words.path} is damaged: {printable(first_line(error))}") from None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
        **special,
    )
    template = words.template()
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


class _Words:
    """The vocabulary of one file."""

    def __init__(self, source: Source) -> None:
        from gguf import TokenType

        self.metadata = source.metadata
        self.path = source.shown
        self.model = self._get("model")
        if self.model not in ("gpt2", "llama"):
            raise ConfigError(
                f"{self.path} has a tokenizer of the kind {printable(str(self.model), 80)!r}; only 'gpt2' (byte-level "
                "BPE) and 'llama' (BPE of SentencePiece) can be read"
            )
        self.tokens = list(self._get("tokens") or ())
        if not self.tokens:
            raise ConfigError(f"{self.path} has no vocabulary (tokenizer.ggml.tokens)")
        self.types = list(self._get("token_type") or [int(TokenType.NORMAL)] * len(self.tokens))
        if len(self.types) != len(self.tokens):
            raise CheckpointError(f"{self.path} has {len(self.tokens)} tokens, but types of {len(self.types)}")
        if self.model == "llama":
            for token, kind in enumerate(self.types):
                if kind == TokenType.USER_DEFINED:
                    self.tokens[token] = self.tokens[token].replace(" ", SPACE)
        self.vocab = self._vocab()
        self.special = self._special()

    def _get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def _vocab(self) -> dict[str, int]:
        """Ids by text, without placeholders for rows of the embedding that have no token."""
        vocab: dict[str, int] = {}
        for token, text in enumerate(self.tokens):
            if text == f"[PAD{token}]":
                continue
            if text in vocab:
                raise ConfigError(f"{self.path} has the token {printable(text, 80)!r} twice: {vocab[text]} and {token}")
            vocab[text] = token
        return vocab

    def _special(self) -> dict[str, int]:
        special = {}
        for ours, theirs in SPECIAL.items():
            token = self._get(f"{theirs}_token_id")
            if token is None:
                continue
            if not isinstance(token, int) or not 0 <= token < len(self.tokens):
                raise CheckpointError(
                    f"{self.path} says that its {ours} is {token!r}, but has {len(self.tokens)} tokens"
                )
            special[ours] = token
        return special

    def added(self) -> list[dict[str, Any]]:
        """The tokens that are found in a text before it is split."""
        from gguf import TokenType

        name = str(self.metadata.get("general.name", "")).lower()
        strips = "phi-3" in name or "phi3" in name  # llama.cpp's rule
        added = []
        for token, kind in enumerate(self.types):
            text = self.tokens[token]
            is_special = kind == TokenType.CONTROL or token in self.special.values()
            if text not in self.vocab or not (is_special or kind == TokenType.USER_DEFINED):
                continue
            added.append(
                {
                    "id": token,
                    "content": text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": strips and is_special and text not in PHI3_KEEPS,
                    "normalized": False,
                    "special": is_special,
                }
            )
        return added

    def post_processor(self) -> dict[str, Any]:
        """The step that adds the first and the last token."""
        first = self._get("add_bos_token", self.model == "llama" or self._pre() == "llama-bpe")
        last = self._get("add_eos_token", False)
        single: list[Any] = [{"Sequence": {"id": "A", "type_id": 0}}]
        pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
        tokens = {}
        for name, is_added, place in (("bos_token", first, 0), ("eos_token", last, len(pair))):
            if not is_added or name not in self.special:
                continue
            token = self.special[name]
            text = self.tokens[token]
            tokens[text] = {"id": text, "ids": [token], "tokens": [text]}
            for sequence in (single, pair):
                sequence.insert(place, {"SpecialToken": {"id": text, "type_id": 0}})
        return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}

    def template(self) -> str | dict[str, str] | None:
        """The chat template, or several by name."""
        default = self.metadata.get(TEMPLATE)
        named = {
            name: self.metadata[f"{TEMPLATE}.{name}"] for name in self.metadata.get("tokenizer.chat_templates", ())
        }
        if not named:
            return default
        return named if default is None else {"default": default} | named

    # Byte-level BPE

    def _pre(self) -> str:
        name = str(self._get("pre", ""))
        return OTHER_NAMES.get(name, name)

    def byte_level(self) -> dict[str, Any]:
        by_name = {name: key for key, name in PRE_TOKENIZERS.items()}
        pre = self._pre()
        if pre not in by_name:
            named = f"the pre-tokenizer {printable(pre, 80)!r}" if pre else "no pre-tokenizer"
            raise ConfigError(
                f"{self.path} names {named} (tokenizer.ggml.pre), so it is unknown how to split text; these can be "
                f"read: {', '.join(sorted([*by_name, *OTHER_NAMES]))}{nearest(pre, by_name)}"
            )
        steps, ignores_merges = by_name[pre]
        merges = self._get("merges")
        if not merges:
            raise ConfigError(f"{self.path} has no merges of its tokenizer (tokenizer.ggml.merges)")
        return {
            "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_step(step) for step in steps]},
            "decoder": _bytes(False),
            "model": _bpe(self.vocab, merges, ignore_merges=ignores_merges),
        }

    # SentencePiece

    def sentencepiece(self) -> dict[str, Any]:
        has_prefix = self._get("add_space_prefix", True)
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        prepend = {"type": "Prepend", "prepend": SPACE}
        decoders = [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if has_prefix:
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        unknown = self.special.get("unk_token")
        model = _bpe(
            self.vocab,
            self._get("merges") or self._merges(),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else self.tokens[unknown],
        )
        return {
            "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if has_prefix else replace,
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": model,
        }

    def _merges(self) -> list[list[str]]:
        """The merges that the scores stand for: all pairs of tokens that make a token, highest score first."""
        from gguf import TokenType

        scores = self._get("scores")
        if not scores or len(scores) != len(self.tokens):
            raise ConfigError(f"{self.path} has no scores of its tokens (tokenizer.ggml.scores)")
        order = []
        for text, token in self.vocab.items():
            if self.types[token] == TokenType.USER_DEFINED:  # Gemma's runs of spaces; their scores have no meaning
                order.append((0, 0.0, token, text))
            elif self.types[token] == TokenType.NORMAL:
                order.append((1, -scores[token], token, text))
        merges: list[list[str]] = []
        for _, _, _, text in sorted(order):
            splits = [(text[:i], text[i:]) for i in range(1, len(text))]
            pairs = [(left, right) for left, right in splits if left in self.vocab and right in self.vocab]
            merges += [[*pair] for pair in sorted(pairs, key=lambda pair: (self.vocab[pair[0]], self.vocab[pair[1]]))]
        return merges


def _bpe(vocab: dict[str, int], merges: Sequence[Any], **settings: Any) -> dict[str, Any]:
    """A BPE model as JSON."""
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges],
    }
    return model | settings


def _bytes(splits: bool) -> dict[str, Any]:
    """The step that writes bytes as letters, and may split into words before."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": splits}


def _step(name: str) -> dict[str, Any]:
    """A step of a pre-tokenizer as JSON: the inverse of the names in `PRE_TOKENIZERS`."""
    if name in (WORDS, BYTES):
        return _bytes(name == WORDS)
    if name == DIGITS:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": name}, "behavior": "Isolated", "invert": False}
