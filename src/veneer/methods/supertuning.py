"""Super-Tuning: learn what to add to the weight's largest entries; "Supra" adds a LoRA.

    W' = W + S + s B A,  S zero except at the (1 - sparsity) in out largest |W|,  s = lora_alpha / r

2026, arXiv:2607.09287 as PEFT's documentation names it. Trainable: (1 - sparsity) in out, and r (in + out) with a rank,
per target. Mergeable. Starts as a no-op: S and B are zero. The paper's choice by activations (as Wanda's) is not here,
nor in PEFT. The file holds the places, or with `save_precomputed_indices=False` they are found again in the base
model. Unlike in PEFT, GPT-2's Conv1D and convolutions are targets too, and S is added in the adapter's precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Additive, Tensors
from ..core.config import LayerConfig, Name, check_range
from ..errors import CheckpointError, ConfigError
from ..maths.sparse import add_product, is_cheaper_sparse, scatter
from ..targets.target import Target


class Supertuning(Additive):
    kinds = frozenset({"linear", "conv"})

    def __init__(self, config: SupertuningConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.shape = target.out_features, target.in_features
        n = self.entries()
        if n < 1:
            raise ConfigError(
                f"sparsity {config.sparsity} on {target.path!r} leaves none of its {math.prod(self.shape)} entries "
                "to learn; use a smaller sparsity"
            )
        self.supertuning_values = nn.Parameter(torch.zeros(n) if config.init_weights else torch.randn(n))
        indices = torch.empty(n, dtype=torch.int32)
        if not (indices.is_meta and config.save_precomputed_indices):
            scores = target.original_weight().detach().abs().flatten()
            indices = scores.topk(n, largest=config.select_top).indices.int()
        self.register_buffer("supertuning_indices", indices, persistent=config.save_precomputed_indices)
        if config.r is not None:
            self.scaling = config.lora_alpha / config.r  # type: ignore[operator]
            self.dropout = nn.Dropout(config.lora_dropout)
            self.supertuning_lora_A, self.supertuning_lora_B = target.factors(config.r)
            nn.init.kaiming_uniform_(self.supertuning_lora_A.weight, a=math.sqrt(5))
            B = self.supertuning_lora_B.weight
            nn.init.zeros_(B) if config.init_weights else nn.init.kaiming_uniform_(B, a=math.sqrt(5))

    def entries(self) -> int:
        return int(math.prod(self.shape) * (1 - self.config.sparsity))

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and s B (out, r) of the LoRA."""
        return self.supertuning_lora_A.matrix(), self.supertuning_lora_B.matrix() * self.scaling

    def sparse(self) -> Tensor:
        """S, (out, in)."""
        return scatter(self.supertuning_values, self.supertuning_indices.long(), *self.shape)

    def delta(self) -> Tensor:
        return self.sparse() if self.config.r is None else self.sparse() + self.target.product(*self.pair())

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        if self.target.kind == "linear" and is_cheaper_sparse(x, self.supertuning_values, self.shape[0]):
            y = add_product(y, x, self.supertuning_values, self.supertuning_indices.long())
        else:
            y = y + self.target.op(x, self.sparse())
        return y if self.config.r is None else y + self.target.low_rank(self.dropout(x), *self.pair())

    def absorb(self, tensors: Tensors) -> None:
        indices = tensors.get("supertuning_indices", self.supertuning_indices)
        if not 0 <= int(indices.min()) <= int(indices.max()) < math.prod(self.shape):
            raise CheckpointError(f"supertuning_indices of {self.target.path!r} lie outside its weight {self.shape}")
        super().absorb(tensors)

    def expected_parameters(self) -> int:
        r, target = self.config.r or 0, self.target
        return self.entries() + r * target.in_features * target.groups + r * target.out_features // target.groups

    def describe(self) -> str:
        rank = "" if self.config.r is None else f", r={self.config.r}"
        return f"{self.supertuning_values.numel()} entries{rank}"


@dataclass(kw_only=True)
class SupertuningConfig(LayerConfig):
    sparsity: float = 0.99
    """Share of a weight's entries that are not learned."""
    select_top: bool = True
    """Learn the entries of largest magnitude; False: of smallest."""
    r: int | None = None
    """Rank of the LoRA beside the entries ("Supra"); None: without."""
    lora_alpha: int | float | None = None
    """Strength of the LoRA: it is scaled by lora_alpha / r; None: 2 r."""
    lora_dropout: float = 0.0
    """Dropout on the LoRA's input, in training."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""
    save_precomputed_indices: bool = True
    """Write the entries' places into the file; False: half the size, and the base model must be the same to a bit."""

    peft_type, adapter = Name("SUPERTUNING"), Supertuning
    learning_rate = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
        check_range(self, 0, 1, "sparsity", "lora_dropout")
        if self.r is None and self.lora_alpha is not None:
            raise ConfigError("lora_alpha scales the LoRA, which needs its rank r; set r, or leave lora_alpha out")
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
