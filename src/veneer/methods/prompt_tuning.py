"""Prompt tuning: learn embeddings that are placed in front of the input.

    [p_1 ... p_n, E(x_1) ... E(x_T)]

Lester et al., 2021, arXiv:2104.08691. Trainable: n x width. Not mergeable: it has no weight form. Starts at random
embeddings, at those of random tokens, or at those of a text. For an encoder-decoder, PEFT's files hold twice as many
rows, and the second half is unused. The method needs a learning rate hundreds of times as large as weights do: on
SmolLM2-135M and 60 rows of GSM8K, a rate of 0.3 reaches nine tenths of LoRA's gain, and 1e-3 a seventh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.config import Name, PromptConfig
from ..core.prompt import Prompt, Spec
from ..errors import ConfigError

INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


class PromptTuning(Prompt):
    def __init__(self, config: PromptTuningConfig, spec: Spec, words: Tensor) -> None:
        super().__init__(config, spec, words)
        rows = self.n * spec.submodules
        self.prompt_embeddings = nn.Parameter(torch.empty(rows, spec.width))
        if not self.prompt_embeddings.is_meta:
            with torch.no_grad():
                self.prompt_embeddings.copy_(self.start(config, rows, words))

    def start(self, config: PromptTuningConfig, rows: int, words: Tensor) -> Tensor:
        """The initial prompt, (rows, width)."""
        if config.prompt_tuning_init == "RANDOM":
            return torch.randn(rows, words.shape[1])
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            tokens = torch.randint(len(words), (rows,))
        else:
            tokens = torch.tensor(config.tokens_of_text()).repeat(rows)[:rows]
        return words[tokens.to(words.device)].float()

    def embeds(self, facts: dict[str, Any]) -> Tensor:
        return self.prompt_embeddings[: self.n]


@dataclass(kw_only=True)
class PromptTuningConfig(PromptConfig):
    prompt_tuning_init: str = "RANDOM"
    """How the prompt starts: "RANDOM", "SAMPLE_VOCAB" (embeddings of random tokens) or "TEXT"."""
    prompt_tuning_init_text: str | None = None
    """The text to start from, repeated or truncated to the prompt's length."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer for the text: a directory or the id of a repository on the Hub."""
    tokenizer_kwargs: dict[str, Any] | None = None
    """Keyword arguments for the tokenizer's `from_pretrained`."""

    peft_type = Name("PROMPT_TUNING")
    prompt = PromptTuning
    learning_rate = 0.3
    inits: ClassVar[tuple[str, ...]] = INITS
    """The allowed values of `prompt_tuning_init`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompt_tuning_init = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
        if self.prompt_tuning_init not in self.inits:
            raise ConfigError(
                f"prompt_tuning_init must be one of {', '.join(self.inits)}, not {self.prompt_tuning_init!r}"
            )
        has_text = self.prompt_tuning_init_text and self.tokenizer_name_or_path
        if self.prompt_tuning_init == "TEXT" and not has_text:
            raise ConfigError("prompt_tuning_init TEXT needs prompt_tuning_init_text and tokenizer_name_or_path")
        if "trust_remote_code" in (self.tokenizer_kwargs or {}):
            raise ConfigError("tokenizer_kwargs may not set trust_remote_code: a checkpoint could run code with it")

    def tokens_of_text(self) -> list[int]:
        """The token ids of `prompt_tuning_init_text`."""
        from transformers import AutoTokenizer

        from ..files.pull import resolve

        assert self.tokenizer_name_or_path
        source = resolve(self.tokenizer_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(source, **(self.tokenizer_kwargs or {}))
        tokens = tokenizer(self.prompt_tuning_init_text)["input_ids"]
        if not tokens:
            raise ConfigError(f"prompt_tuning_init_text {self.prompt_tuning_init_text!r} has no tokens")
        return tokens
