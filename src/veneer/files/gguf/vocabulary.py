"""Tokenizers in GGUF. llama.cpp knows two kinds that matter here, and splits text into words by a name in its table.

- "gpt2": byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM). The name of the pre-tokenizer stands for a regular expression
  that is compiled into llama.cpp; it is found here by the steps of the tokenizer itself.
- "llama": BPE of SentencePiece, with bytes as a fallback (Llama 2, Mistral, Gemma, Phi-3). llama.cpp merges by scores
  of the tokens instead of a list of merges; the scores here give the same order.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigError, first_line
from .file import Metadata

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
END_OF_SPLIT = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
OTHER = r"[^\r\n\p{L}\p{N}]?"
LLAMA3 = CONTRACTIONS + rf"|{OTHER}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + END_OF_SPLIT
QWEN2 = CONTRACTIONS + rf"|{OTHER}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + END_OF_SPLIT
TEKKEN = rf"{OTHER}{UPPER}*{LOWER}+|{OTHER}{UPPER}+{LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + END_OF_SPLIT
GPT4O = (
    rf"{OTHER}{UPPER}*{LOWER}+{CONTRACTIONS}?|{OTHER}{UPPER}+{LOWER}*{CONTRACTIONS}?|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + END_OF_SPLIT
)
WORDS = "bytes, split as GPT-2"
"""The step of a byte-level pre-tokenizer that also splits into words."""
BYTES = "bytes"
DIGITS = "single digits"

Steps = tuple[str, ...]
PRE_TOKENIZERS: dict[tuple[Steps, bool], str] = {
    ((WORDS,), False): "gpt-2",
    ((DIGITS, WORDS), False): "smollm",
    ((LLAMA3, BYTES), True): "llama-bpe",
    ((LLAMA3, BYTES), False): "dbrx",
    ((QWEN2, BYTES), False): "qwen2",
    ((TEKKEN, BYTES), True): "tekken",
    ((GPT4O, BYTES), False): "gpt-4o",
}
"""llama.cpp's names of pre-tokenizers, by their steps and whether words in the vocabulary are taken whole
(`ignore_merges`)."""
PHI3_KEEPS = {"<unk>", "<s>", "<|endoftext|>"}
"""Phi-3's special tokens that do not take the spaces after them; all others do."""
SPACE = "▁"
"""SentencePiece's space."""


@dataclass
class Vocabulary:
    """A tokenizer as llama.cpp reads it."""

    model: str
    """"gpt2" or "llama"."""
    pre: str
    """llama.cpp's name of the pre-tokenizer."""
    tokens: list[str]
    types: list[int]
    special: dict[str, int]
    """Ids of special tokens by llama.cpp's names."""
    add_bos: bool
    add_eos: bool
    merges: list[str] | None = None
    scores: list[float] | None = None
    add_space_prefix: bool | None = None
    chat_template: str | None = None
    strips: bool = False
    """Special tokens take the spaces that follow them, as Phi-3's do."""
    notes: list[str] = field(default_factory=list)
    """How llama.cpp tokenizes differently."""

    def named(self, name: str) -> str:
        """A name for the model: llama.cpp takes special tokens as Phi-3's if the name says "phi-3" or "phi3"."""
        plain = re.sub("phi-?3", "Phi 3", name, flags=re.IGNORECASE)
        return f"{plain} (Phi-3)" if self.strips else plain

    def metadata(self) -> Metadata:
        metadata: Metadata = {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": np.array(self.types, dtype=np.int32),
            "tokenizer.ggml.add_bos_token": self.add_bos,
            "tokenizer.ggml.add_eos_token": self.add_eos,
        }
        if self.merges is not None:
            metadata["tokenizer.ggml.merges"] = self.merges
        if self.scores is not None:
            metadata["tokenizer.ggml.scores"] = self.scores
        if self.add_space_prefix is not None:
            metadata["tokenizer.ggml.add_space_prefix"] = self.add_space_prefix
        for name, token in self.special.items():
            metadata[f"tokenizer.ggml.{name}_token_id"] = token
        if self.chat_template is not None:
            metadata["tokenizer.chat_template"] = self.chat_template
        return metadata


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in a directory, as transformers loads it.

    Raises:
        ConfigError: there is none, or it is not one of the `tokenizers` library.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigError(
            f"{str(directory)!r} has no tokenizer that transformers loads ({first_line(error)}); a GGUF file needs one"
        ) from None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ConfigError(
            f"the tokenizer in {str(directory)!r} is a {type(tokenizer).__name__}, without tokenizer.json"
        )
    return tokenizer


def vocabulary(tokenizer: Any, size: int, stops: list[int]) -> Vocabulary:
    """Translate a tokenizer.

    Args:
        tokenizer: a tokenizer of transformers that is based on the `tokenizers` library.
        size: the number of rows of the embedding; ids without a token get placeholders.
        stops: ids of tokens that end a generation.

    Raises:
        ConfigError: llama.cpp has no such tokenizer, or it has more tokens than the embedding has rows.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = content["model"]["type"]
    if kind != "BPE":
        raise ConfigError(f"the tokenizer's model is {kind}; only BPE can be exported to GGUF")
    highest = max(tokenizer.get_vocab().values())
    if highest >= size:
        raise ConfigError(f"the tokenizer has the id {highest}, but the embedding only {size} rows")
    translate = _sentencepiece if content["model"].get("byte_fallback") else _byte_level
    result = translate(content, size)
    result.add_bos, result.add_eos = _adds(tokenizer)
    result.special = _special(tokenizer, stops)
    _note_strips(content["added_tokens"], result)
    result.chat_template = _chat_template(tokenizer)
    return result


# Byte-level BPE


def _byte_level(content: dict[str, Any], size: int) -> Vocabulary:
    model = content["model"]
    steps = tuple(_steps(content["pre_tokenizer"]))
    pre = PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    if pre is None:
        described = " + ".join(steps) or "no pre-tokenizer"
        raise ConfigError(f"llama.cpp has no name for the tokenizer's pre-tokenizer: {described[:300]}")
    normalizer = content["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":  # Qwen's; llama.cpp passes text on as it is
        raise ConfigError(f"llama.cpp has no normalizer {normalizer['type']} for byte-level BPE")
    tokens, types = _tokens(content, size)
    return Vocabulary("gpt2", pre, tokens, types, {}, False, False, merges=_merges(model))


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[str]:
    """What a pre-tokenizer does, one word or regular expression for each step."""
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        steps = []
        for part in pre_tokenizer["pretokenizers"]:
            steps += _steps(part)
        return steps
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return [WORDS if pre_tokenizer["use_regex"] else BYTES]
    if kind == "Digits" and pre_tokenizer["individual_digits"]:
        return [DIGITS]
    if kind == "Split" and pre_tokenizer["behavior"] in ("Isolated", "Removed"):
        is_plain = pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]
        is_inverted = pre_tokenizer["behavior"] == "Removed" and pre_tokenizer["invert"]
        pattern = pre_tokenizer["pattern"]
        if "Regex" in pattern and (is_plain or is_inverted):
            return [pattern["Regex"]]
    return [json.dumps(pre_tokenizer)]


def _merges(model: dict[str, Any]) -> list[str]:
    """The merges, each as two tokens with a space between."""
    merges = []
    for merge in model["merges"]:
        merges.append(merge if isinstance(merge, str) else " ".join(merge))
    return merges


# SentencePiece


def _sentencepiece(content: dict[str, Any], size: int) -> Vocabulary:
    prefix, is_first_only = _space_prefix(content)
    tokens, types = _tokens(content, size)
    result = Vocabulary("llama", "default", tokens, types, {}, False, False)
    result.scores = _scores(content["model"], tokens)
    result.add_space_prefix = prefix
    if is_first_only:
        result.notes.append(
            "the tokenizer puts a space before the first word of a text, llama.cpp also after each special token"
        )
    return result


def _space_prefix(content: dict[str, Any]) -> tuple[bool, bool]:
    """(whether a space is put before text, whether only at its start and not after special tokens)."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    normalizer = content["normalizer"]
    pre = content["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    splits_spaces = pre is not None and pre["type"] == "Split" and pre["pattern"] == {"String": " "}
    if steps == [prepend, replace] and pre is None:
        return True, False
    if steps == [replace] and (pre is None or splits_spaces):
        return False, False
    is_metaspace = pre is not None and pre["type"] == "Metaspace" and not pre["split"]
    if steps == [] and is_metaspace and pre["replacement"] == SPACE:
        scheme = pre["prepend_scheme"]
        return scheme != "never", scheme == "first"
    raise ConfigError(
        "llama.cpp has no tokenizer that treats spaces as this one: normalizer "
        f"{json.dumps(normalizer)}, pre-tokenizer {json.dumps(pre)}"
    )


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """A score for each token: tokens that are merged earlier have higher ones."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    lowest = len(model["merges"])
    return [-float(ranks.get(token, lowest)) for token in tokens]


# Both


def _tokens(content: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """(text, type) of each id below `size`."""
    from gguf import TokenType

    model = content["model"]
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, token in model["vocab"].items():
        is_byte = bool(model.get("byte_fallback")) and text.startswith("<0x") and len(text) == 6
        tokens[token] = text
        types[token] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in content["added_tokens"]:
        text = added["content"]
        if model.get("byte_fallback") and not added["special"]:
            text = text.replace(SPACE, " ")
        tokens[added["id"]] = text
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None and model.get("byte_fallback"):
        types[unknown] = int(TokenType.UNKNOWN)
    return tokens, types


def _note_strips(added: list[dict[str, Any]], result: Vocabulary) -> None:
    """Set `strips`, or note that llama.cpp does not take spaces around tokens as the tokenizer does."""
    stripping = {token["content"] for token in added if token["rstrip"]}
    special = {token["content"] for token in added if token["special"]}
    if stripping and stripping == special - PHI3_KEEPS and special >= PHI3_KEEPS:
        result.strips = True
    elif stripping or any(token["lstrip"] for token in added):
        result.notes.append("some tokens take the spaces around them, which llama.cpp keeps")


def _adds(tokenizer: Any) -> tuple[bool, bool]:
    """(whether the tokenizer begins a text with its first token, whether it ends it with its last).

    Raises:
        ConfigError: it adds other tokens.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and whole[: len(plain) + 1] == [bos, *plain]
    rest = whole[1:] if adds_bos else whole
    adds_eos = eos is not None and rest == [*plain, eos]
    if rest != plain and not adds_eos:
        raise ConfigError(
            f"the tokenizer adds tokens that llama.cpp cannot add: {tokenizer.convert_ids_to_tokens(whole)} for 'a'"
        )
    return adds_bos, adds_eos


def _special(tokenizer: Any, stops: list[int]) -> dict[str, int]:
    """Ids of special tokens by llama.cpp's names."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
    special = {}
    for ours, theirs in names.items():
        token = getattr(tokenizer, f"{ours}_token_id", None)
        if token is not None:
            special[theirs] = token
    others = [token for token in stops if token != special.get("eos")]
    if others:
        special["eot"] = others[0]
    return special


def _chat_template(tokenizer: Any) -> str | None:
    """The default chat template."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return template.get("default")
    return template
