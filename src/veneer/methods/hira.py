"""HiRA: multiply each entry of the frozen weight by an entry of a low-rank matrix, for an update of high rank.

    W' = W0 + W0 * (B A),  A (r, in), B (out, r), W0 the pretrained weight

Huang et al., 2025, OpenReview:TwJrTz9cRS (ICLR; not on arXiv). Trainable: r (in + out) per target. Mergeable. Starts as
a no-op: B is zero (on embeddings, A is). The update reads the pretrained weight even when other adapters are active or
merged, so their order does not matter. Unlike in PEFT, convolutions keep their padding mode, and the values "gaussian"
and False of `init_weights` have the same meaning for convolutions as for linear layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapter import Additive
from ..core.config import LayerConfig, Name, at, check_range, mapping
from ..errors import ConfigError, TargetError
from ..targets.target import Target


class HiRA(Additive):
    kinds = frozenset({"linear", "conv", "embedding"})

    def __init__(self, config: HiraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        if target.groups > 1:
            kind = type(target.base).__name__
            raise TargetError(f"{target.path!r} is a {kind} with {target.groups} groups, for which HiRA has no form")
        self.r = at(target.path, config.rank_pattern, config.r)
        A, B = target.factors(self.r)
        if target.kind == "embedding":  # the file uses other names for embeddings
            self.hira_embedding_A = A.weight
            self.hira_embedding_B = B.weight
        else:
            self.hira_A = A.weight
            self.hira_B = B.weight
        self.dropout = nn.Dropout(config.hira_dropout) if config.hira_dropout > 0 else nn.Identity()
        self.initialise(config.init_weights)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        if self.target.kind == "embedding":
            return self.hira_embedding_A, self.hira_embedding_B
        return self.hira_A.flatten(1), self.hira_B.flatten(1)

    @torch.no_grad()
    def initialise(self, how: bool | str | None) -> None:
        A, B = self.matrices()
        if not how:
            A.normal_()
            B.normal_()
        elif self.target.kind == "embedding":
            A.zero_()
            B.normal_()
        else:
            if how == "gaussian":
                A.normal_(std=1 / self.r)
            else:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            B.zero_()

    @property
    def is_dense(self) -> bool:
        return self.target.kind != "embedding" and not isinstance(self.dropout, nn.Dropout)

    def delta(self) -> Tensor:
        A, B = self.matrices()
        return self.target.original_weight().to(A.dtype) * (B @ A)

    def term(self, x: Tensor) -> Tensor:
        if self.target.kind != "embedding":
            return self.target.op(self.dropout(x), self.delta())
        A, B = self.matrices()
        W0 = self.target.original_weight().to(A.dtype)
        scale = F.linear(F.embedding(x, A.T), B)  # of the tokens in x only, not of the whole vocabulary
        return self.target.op(x, W0) * scale

    def expected_parameters(self) -> int:
        return self.r * (self.target.in_features + self.target.out_features)

    def describe(self) -> str:
        return f"r={self.r}, {self.target.in_features} -> {self.target.out_features}"


@dataclass(kw_only=True)
class HiraConfig(LayerConfig):
    r: int = 32
    """Rank of the matrix that the weight is multiplied by, entry by entry."""
    hira_dropout: float = 0.0
    """Dropout on the input of the update during training; no effect on embeddings."""
    init_weights: bool | str | None = True
    """True: A is uniform and B zero. "gaussian": A is normal and B zero. False: both are random (for tests)."""
    rank_pattern: dict[str, int] | None = mapping()
    """Ranks for specific targets, by name ending or regular expression."""

    peft_type = Name("HIRA")
    adapter = HiRA
    patterns = ("rank_pattern",)
    learning_rate = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "rank_pattern")
        check_range(self, 0, 1, "hira_dropout")
        if isinstance(self.init_weights, str) and self.init_weights != "gaussian":
            raise ConfigError(f'init_weights {self.init_weights!r} is unknown; use True, False or "gaussian"')
