"""Trainable tokens: learn the embeddings of a few tokens and leave the rest of the vocabulary unchanged.

    E'[i] = delta[i] for the chosen tokens i,  E' = E elsewhere; a tied output head uses E' too

Meant for special tokens that were added with `resize_token_embeddings`. Trainable: tokens x width. Mergeable. Starts as
a no-op. The method is from PEFT; there is no paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapter import Adapter, Tensors
from ..core.config import LayerConfig, Name
from ..errors import ConfigError
from ..targets.target import Target
from ..targets.walk import bare, walk


class TrainableTokens(Adapter):
    kinds = frozenset({"embedding", "linear"})
    follows_ties = True

    def __init__(
        self,
        config: TrainableTokensConfig,
        target: Target,
        shared: nn.Module | None = None,
        twin: TrainableTokens | None = None,
    ) -> None:
        super().__init__(config, target, twin)
        rows = self.rows(target.weight())
        top = max(config.token_indices)
        if top >= len(rows):
            raise ConfigError(f"token_indices: {top} is outside the vocabulary of {len(rows)} of {target.path!r}")
        index = torch.tensor(config.token_indices, device=rows.device)
        if twin is None:
            start = rows[index] if config.init_weights else torch.randn_like(rows[index])
            self.trainable_tokens_delta = nn.Parameter(start.detach().clone())
        # For each token of the vocabulary, its row in delta, or -1 if it is not learned.
        place = torch.full((len(rows),), -1, device=rows.device)
        order = torch.arange(len(index), device=rows.device)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("place", place.index_copy(0, index, order), persistent=False)

    @property
    def delta(self) -> Tensor:
        """The learned rows, (tokens, width); on a tied module, those of the first module."""
        first = self if self.shared is None else self.shared
        return first.trainable_tokens_delta

    @property
    def originals(self) -> Tensor:
        """The base model's rows of the learned tokens, (tokens, width)."""
        return self.rows(self.target.weight())[self.index].detach()

    def export(self) -> Tensors:
        return {"trainable_tokens_delta": self.delta.detach()}

    def absorb(self, tensors: Tensors) -> None:
        if self.shared is None:
            super().absorb(tensors)

    def repeats(self) -> dict[str, str]:
        if self.shared is None:
            return {}
        name = "trainable_tokens_delta"
        return {name: f"{self.shared.target.path}.{name}"}

    def rows(self, W: Tensor) -> Tensor:
        """W as (vocabulary, width), for an embedding or a head. It is its own inverse."""
        return W.T if self.target.kind == "embedding" else W

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        delta = self.delta
        if self.target.kind == "embedding":
            place = self.place[x]
            learned = F.embedding(place.clamp_min(0), delta) * self.target.scale
            is_learned = (place >= 0).unsqueeze(-1)
            return torch.where(is_learned, learned.to(y.dtype), y)
        b = self.target.bias()
        if b is not None:
            b = b[self.index].to(delta.dtype)
        logits = F.linear(x, delta, b)
        return y.index_copy(-1, self.index, logits)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        learned = self.rows(W).index_copy(0, self.index, self.delta.to(W.dtype))
        return self.rows(learned), b

    def describe(self) -> str:
        return f"{len(self.index)} tokens"


@dataclass(kw_only=True)
class TrainableTokensConfig(LayerConfig):
    token_indices: list[int] = field(default_factory=list)
    """Ids of the tokens to learn."""
    init_weights: bool = True
    """Start at the tokens' embeddings in the base model; False: random."""

    peft_type = Name("TRAINABLE_TOKENS")
    adapter = TrainableTokens
    learning_rate = 3e-2
    example = {"token_indices": [0, 1, 2]}
    file_holds_embedding = False

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens = self.token_indices
        has_duplicates = len(set(tokens)) < len(tokens)
        if not tokens or min(tokens) < 0 or has_duplicates:
            raise ConfigError(f"token_indices must name one or more tokens, each once, not {tokens}")

    def fill_targets(self, model: nn.Module) -> None:
        get_embedding = getattr(model, "get_input_embeddings", None)
        if get_embedding is None:
            raise ConfigError(f"{type(model).__name__} does not say which module is its embedding; set target_modules")
        embedding = bare(get_embedding())
        self.target_modules = next(path for path, module in walk(model) if module is embedding)
