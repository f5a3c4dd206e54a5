"""Trainable tokens: learn the embeddings of a few tokens and leave the rest of the vocabulary alone.

    E'[i] = delta[i] for the chosen tokens i,  E' = E elsewhere; a tied output head follows

For new special tokens after `resize_token_embeddings`. Trainable: tokens x width. Mergeable. Starts as a no-op.
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
        place = torch.full((len(rows),), -1, device=rows.device)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("place", place.index_copy(0, index, torch.arange(len(index), device=rows.device)), False)

    @property
    def delta(self) -> Tensor:
        """The learned rows, (tokens, width): a tied module's are those of the first."""
        first = self if self.shared is None else self.shared
        return first.trainable_tokens_delta

    @property
    def originals(self) -> Tensor:
        """The rows that the tokens had, (tokens, width)."""
        return self.rows(self.target.weight())[self.index].detach()

    def export(self) -> Tensors:
        return {"trainable_tokens_delta": self.delta.detach()}

    def absorb(self, tensors: Tensors) -> None:
        if self.shared is None:
            super().absorb(tensors)

    def repeats(self) -> dict[str, str]:
        name = "trainable_tokens_delta"
        return {} if self.shared is None else {name: f"{self.shared.target.path}.{name}"}

    def rows(self, W: Tensor) -> Tensor:
        """W with a row for each token, whether the module is the embedding or the head."""
        return W.T if self.target.kind == "embedding" else W

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        delta = self.delta
        if self.target.kind == "embedding":
            place = self.place[x]
            learned = F.embedding(place.clamp_min(0), delta) * self.target.scale
            return torch.where((place >= 0).unsqueeze(-1), learned.to(y.dtype), y)
        b = self.target.bias()
        return y.index_copy(-1, self.index, F.linear(x, delta, None if b is None else b[self.index].to(delta.dtype)))

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        learned = self.rows(W).index_copy(0, self.index, self.delta.to(W.dtype))
        return self.rows(learned), b

    def describe(self) -> str:
        return f"{len(self.index)} tokens"


@dataclass(kw_only=True)
class TrainableTokensConfig(LayerConfig):
    token_indices: list[int] = field(default_factory=list)
    """Which tokens to learn."""
    init_weights: bool = True
    """Start at the tokens' own embeddings; False: random."""

    peft_type, adapter = Name("TRAINABLE_TOKENS"), TrainableTokens
    learning_rate = 3e-2
    example = {"token_indices": [0, 1, 2]}
    file_holds_embedding = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            not self.token_indices
            or min(self.token_indices) < 0
            or len(set(self.token_indices)) < len(self.token_indices)
        ):
            raise ConfigError(f"token_indices must name one or more tokens, each once, not {self.token_indices}")

    def fill_targets(self, model: nn.Module) -> None:
        get = getattr(model, "get_input_embeddings", None)
        if get is None:
            raise ConfigError(f"{type(model).__name__} does not say which module is its embedding; give target_modules")
        self.target_modules = next(path for path, module in walk(model) if module is bare(get()))
