"""Prefix tuning: learn keys and values that every attention layer sees before the input.

    softmax(q [P_K, K]^T) [P_V, V],  P learned directly or as MLP(p), which trains more stably (`prefix_projection`)

Li and Liang, 2021, arXiv:2101.00190. Trainable: n x layers x 2 x width, or the embedding and the MLP. Not mergeable:
the prefix is in the key-value cache. The file holds the projected prefix, and the file beside it (`core/remainder.py`)
the projection, for training on. The random start disturbs the model, and training with a small learning rate does not
undo that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Tensors
from ..core.config import Name, PromptConfig
from ..core.prompt import Prompt, Spec
from ..errors import ConfigError, NotResumable


class Prefix(Prompt):
    """A prompt of learned cache entries, stored as one row for each position."""

    def prefix(self) -> Tensor:
        """(n, layers x 2 x width)."""
        raise NotImplementedError  # every subclass defines it

    def key_values(self, facts: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        spec = self.spec
        entries = self.prefix().view(self.n, spec.layers, 2, spec.heads, spec.head_dim)
        cache = entries.permute(1, 2, 3, 0, 4)  # (layers, 2, heads, n, head_dim)
        # For an encoder-decoder, PEFT splits the entries as if each layer used four: layer i reads those of layer 2 i
        # modulo the number of layers, and half of the entries are unused. PEFT's files depend on this.
        step = 2 if spec.submodules == 2 else 1
        pairs = []
        for layer in range(spec.layers):
            source = step * layer % spec.layers
            pairs.append((cache[source, 0], cache[source, 1]))
        return pairs

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
            first = nn.Linear(spec.width, hidden)
            last = nn.Linear(hidden, size)
            self.transform = nn.Sequential(first, nn.Tanh(), last)
        else:
            self.prompt_embeddings = nn.Parameter(torch.randn(self.n, size))
        if config.init_weights == "zero":
            self._zero_prefix()

    def _zero_prefix(self) -> None:
        module = self.transform[-1] if self.is_projected else self
        for parameter in module.parameters():
            nn.init.zeros_(parameter)

    def prefix(self) -> Tensor:
        if self.is_projected:
            return self.transform(self.embedding.weight)
        return self.prompt_embeddings

    def remainder(self) -> Tensors:
        return self.state_dict() if self.is_projected else {}

    def absorb(self, tensors: Tensors) -> None:
        if self.is_projected and "embedding.weight" not in tensors:
            raise NotResumable.because("the projected prefix", "the projection", "prefix_projection=False")
        super().absorb(tensors)


@dataclass(kw_only=True)
class PrefixTuningConfig(PromptConfig):
    encoder_hidden_size: int | None = None
    """Width of the projection's hidden layer; None: the width of a cache entry."""
    prefix_projection: bool = False
    """Train the prefix through an MLP."""
    init_weights: str | None = None
    """"zero": keys and values start at zero; None: random."""

    peft_type = Name("PREFIX_TUNING")
    prompt = PrefixTuning
    learning_rate = 6e-2
    fills_cache = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, "zero"):
            raise ConfigError(f'init_weights must be None or "zero", not {self.init_weights!r}')
