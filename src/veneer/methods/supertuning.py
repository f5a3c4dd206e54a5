"""Super-Tuning: learn an update for the largest entries of the weight; with a rank ("Supra"), also a LoRA.

    W' = W + S + s B A,  S zero except at the (1 - sparsity) in out largest |W|,  s = lora_alpha / r

Ilin et al., 2026, arXiv:2607.09287. Trainable: (1 - sparsity) in out per target, and r (in + out) more with a rank.
Mergeable. Starts as a no-op: S and B are zero. Like PEFT, it does not support the paper's selection by activations (as
in Wanda). The file holds the positions of the entries; with `save_precomputed_indices=False` they are recomputed from
the base model. Unlike in PEFT, GPT-2's Conv1D and convolutions can be targets, and S is added in the adapter's
precision.
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
        self.shape = (target.out_features, target.in_features)
        n = self.entries()
        if n < 1:
            raise ConfigError(
                f"sparsity {config.sparsity} on {target.path!r} leaves none of its {math.prod(self.shape)} entries "
                "to learn; use a smaller sparsity"
            )
        values = torch.zeros(n) if config.init_weights else torch.randn(n)
        self.supertuning_values = nn.Parameter(values)
        indices = torch.empty(n, dtype=torch.int32)
        if not (indices.is_meta and config.save_precomputed_indices):
            magnitudes = target.original_weight().detach().abs().flatten()
            indices = magnitudes.topk(n, largest=config.select_top).indices.int()
        self.register_buffer("supertuning_indices", indices, persistent=config.save_precomputed_indices)
        if config.r is not None:
            self._add_lora(config, config.r)

    def _add_lora(self, config: SupertuningConfig, r: int) -> None:
        assert config.lora_alpha is not None
        self.scaling = config.lora_alpha / r
        self.dropout = nn.Dropout(config.lora_dropout)
        self.supertuning_lora_A, self.supertuning_lora_B = self.target.factors(r)
        nn.init.kaiming_uniform_(self.supertuning_lora_A.weight, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(self.supertuning_lora_B.weight)
        else:
            nn.init.kaiming_uniform_(self.supertuning_lora_B.weight, a=math.sqrt(5))

    def entries(self) -> int:
        """Number of learned entries of the weight."""
        return int(math.prod(self.shape) * (1 - self.config.sparsity))

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and s B (out, r) of the LoRA."""
        A = self.supertuning_lora_A.matrix()
        B = self.supertuning_lora_B.matrix()
        return A, B * self.scaling

    def sparse(self) -> Tensor:
        """S, (out, in)."""
        return scatter(self.supertuning_values, self.supertuning_indices.long(), *self.shape)

    def delta(self) -> Tensor:
        S = self.sparse()
        if self.config.r is None:
            return S
        A, B = self.pair()
        return S + self.target.product(A, B)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        if self.target.kind == "linear" and is_cheaper_sparse(x, self.supertuning_values, self.shape[0]):
            y = add_product(y, x, self.supertuning_values, self.supertuning_indices.long())
        else:
            y = y + self.target.op(x, self.sparse())
        if self.config.r is None:
            return y
        A, B = self.pair()
        return y + self.target.low_rank(self.dropout(x), A, B)

    def absorb(self, tensors: Tensors) -> None:
        indices = tensors.get("supertuning_indices", self.supertuning_indices)
        if not 0 <= int(indices.min()) <= int(indices.max()) < math.prod(self.shape):
            raise CheckpointError(f"supertuning_indices of {self.target.path!r} lie outside its weight {self.shape}")
        super().absorb(tensors)

    def expected_parameters(self) -> int:
        r = self.config.r or 0
        target = self.target
        size_A = r * target.in_features * target.groups
        size_B = r * target.out_features // target.groups
        return self.entries() + size_A + size_B

    def describe(self) -> str:
        rank = "" if self.config.r is None else f", r={self.config.r}"
        return f"{self.supertuning_values.numel()} entries{rank}"


@dataclass(kw_only=True)
class SupertuningConfig(LayerConfig):
    sparsity: float = 0.99
    """Fraction of a weight's entries that are not learned."""
    select_top: bool = True
    """Learn the entries of largest magnitude; False: those of smallest magnitude."""
    r: int | None = None
    """Rank of an additional LoRA ("Supra"); None: no LoRA."""
    lora_alpha: int | float | None = None
    """Strength of the LoRA: it is scaled by lora_alpha / r; None: 2 r."""
    lora_dropout: float = 0.0
    """Dropout on the LoRA's input during training."""
    init_weights: bool = True
    """Start as a no-op; False: random (for tests)."""
    save_precomputed_indices: bool = True
    """Write the entries' positions to the file; False: half the size, but loading needs a bit-identical base model."""

    peft_type = Name("SUPERTUNING")
    adapter = Supertuning
    learning_rate = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
        check_range(self, 0, 1, "sparsity", "lora_dropout")
        if self.r is None and self.lora_alpha is not None:
            raise ConfigError("lora_alpha scales the LoRA, which needs its rank r; set r, or omit lora_alpha")
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
