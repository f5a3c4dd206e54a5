"""Prefix tuning: learn keys and values that every attention layer sees before the input.

    softmax(q [P_K, K]^T) [P_V, V],  P given directly or as MLP(p), which trains more steadily (`prefix_projection`)

Li and Liang, 2021, arXiv:2101.00190. Trainable: n x layers x 2 x width, or the embedding and the MLP. Not mergeable: it
lives in the cache. The file holds the projected result, so a projection can be used but not trained on from a file.
Its start is random and disturbs the model, so that a small rate is not enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Tensors
from ..core.config import Name, PromptConfig
from ..core.prompt import Prompt, Spec
from ..errors import CheckpointError, ConfigError


class Prefix(Prompt):
    """Learned cache entries, held as one row for each position."""

    def prefix(self) -> Tensor:
        """(n, layers x 2 x width)."""
        raise NotImplementedError  # a subclass that forgets it fails in every law

    def key_values(self, facts: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        spec = self.spec
        # (n, layers, 2, heads, head_dim) -> (layers, 2, heads, n, head_dim)
        cache = self.prefix().view(self.n, spec.layers, 2, spec.heads, spec.head_dim).permute(1, 2, 3, 0, 4)
        # PEFT deals an encoder-decoder's entries out as if each layer took four: layer i gets those of 2i, modulo
        # the number of layers. Half of them are never read; its files mean that, so it is kept.
        order = [2 * i % spec.layers if spec.submodules == 2 else i for i in range(spec.layers)]
        return [(cache[i, 0], cache[i, 1]) for i in order]

    def export(self) -> Tensors:
        return {"prompt_embeddings": self.prefix().detach()}


class PrefixTuning(Prefix):
    def __init__(self, config: PrefixTuningConfig, spec: Spec, words: Tensor) -> None:
        super().__init__(config, spec, words)
        size = spec.layers * 2 * spec.width
        config.encoder_hidden_size = config.encoder_hidden_size or spec.width
        self.is_projected = config.prefix_projection and not config.inference_mode
        if self.is_projected:
            hidden = config.encoder_hidden_size
            self.embedding = nn.Embedding(self.n, spec.width)
            self.transform = nn.Sequential(nn.Linear(spec.width, hidden), nn.Tanh(), nn.Linear(hidden, size))
        else:
            self.prompt_embeddings = nn.Parameter(torch.randn(self.n, size))
        if config.init_weights == "zero":
            for last in (*self.transform[-1].parameters(),) if self.is_projected else (self.prompt_embeddings,):
                nn.init.zeros_(last)

    def prefix(self) -> Tensor:
        return self.transform(self.embedding.weight) if self.is_projected else self.prompt_embeddings

    def absorb(self, tensors: Tensors) -> None:
        if self.is_projected:
            raise CheckpointError(
                "the file holds the projected prefix, from which the projection cannot be recovered: load it with "
                "is_trainable=False, or train with prefix_projection=False to be able to resume"
            )
        super().absorb(tensors)


@dataclass(kw_only=True)
class PrefixTuningConfig(PromptConfig):
    encoder_hidden_size: int | None = None
    """Width of the projection's hidden layer; None: the prefix's own width."""
    prefix_projection: bool = False
    """Train the prefix through an MLP."""
    init_weights: str | None = None
    """"zero": keys and values start at zero; None: random."""

    learning_rate = 6e-2
    peft_type, prompt = Name("PREFIX_TUNING"), PrefixTuning
    fills_cache = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, "zero"):
            raise ConfigError(f'init_weights must be None or "zero", not {self.init_weights!r}')
