"""LoRA: learn a low-rank update of a frozen weight.

    W' = W + s B A,  A (r, in), B (out, r),  s = alpha / r, or alpha / sqrt(r) with rsLoRA

Hu et al., 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski, 2023, arXiv:2312.03732. Trainable: r (in + out) per target.
Mergeable. Starts as a no-op: B is zero (on embeddings, A is), or `factors` subtracts a start that is not zero (PiSSA).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import Config, Name, at, check_range, mapping
from ..errors import ConfigError
from ..targets.target import Matrix, Target
from .families.replication import replicate
from .families.tied import TiedLoRA, beside
from .families.variants import Aspect, Composition, Settings, Variants
from .inits.start import StartConfig, Started


class LoRA(Aspect, Started):
    kinds = frozenset({"linear", "conv", "embedding", "param"})

    def __init__(self, config: LoraConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = at(target.path, config.rank_pattern, config.r)
        self.lora_alpha = at(target.path, config.alpha_pattern, config.lora_alpha)
        self.scaling = self.lora_alpha / (math.sqrt(self.r) if config.use_rslora else self.r)
        if target.kind == "embedding":  # the file uses other names and another layout for embeddings
            self.lora_embedding_A = nn.Parameter(torch.empty(self.r, target.in_features))
            self.lora_embedding_B = nn.Parameter(torch.empty(target.out_features, self.r))
        else:
            self.lora_A, self.lora_B = self.make()
            self.set_dropout(config.lora_dropout)
        self.initialise(config.init_lora_weights)

    @property
    def follows_ties(self) -> bool:  # type: ignore[override]
        return self.config.ensure_weight_tying and self.target.kind in TiedLoRA.kinds

    def make(self) -> tuple[Matrix, Matrix]:
        """Uninitialised modules for lora_A and lora_B."""
        return self.target.factors(self.r)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The trained A (r, in) and B (out, r), without the scaling."""
        if self.target.kind == "embedding":
            return self.lora_embedding_A, self.lora_embedding_B
        return self.lora_A.matrix(), self.lora_B.matrix()

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.matrices()
        if self.start_A is None:
            return A, B * self.scaling
        A = torch.cat([A, self.start_A])
        B = torch.cat([B, -self.start_B], dim=1)
        return A, B * self.scaling

    def sizes(self) -> tuple[int, int]:
        """The number of parameters of A and of B for each unit of rank."""
        in_size = self.target.in_features * self.target.groups
        out_size = self.target.out_features // self.target.groups
        return in_size, out_size

    def expected_parameters(self) -> int:
        return self.target.copies * self.r * sum(self.sizes())

    def describe(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, {self.target.in_features} -> {self.target.out_features}"


@dataclass(kw_only=True)
class LoraConfig(Variants, StartConfig):
    r: int = 8
    """Rank of the update."""
    lora_alpha: int | float = 8
    """Strength of the update: it is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the input of the update during training."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead, which keeps high ranks stable (rsLoRA)."""
    rank_pattern: dict[str, int] | None = mapping()
    """Ranks for specific targets, by name ending or regular expression."""
    alpha_pattern: dict[str, int | float] | None = mapping()
    """Values of lora_alpha for specific targets, by name ending or regular expression."""
    target_parameters: list[str] | None = None
    """Bare parameters to adapt, such as those of MoE experts, by name ending ("experts.gate_up_proj"): a matrix, or a
    stack of matrices, one for each expert."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Indices of tokens whose embeddings are also trained: a list for the input embedding, or lists by module name."""
    ensure_weight_tying: bool = False
    """If weights are tied, an adapter on the embedding, or a trained copy of it, also acts in the output head."""
    layer_replication: list[list[int]] | None = None
    """Stack ranges of the model's layers, such as [[0, 4], [2, 5]], before adapting it. Each copy of a layer gets its
    own adapter."""
    use_dora: bool = False
    """Learn the magnitude and the direction of the weight separately (DoRA)."""
    lora_bias: bool = False
    """Also learn an offset to the bias."""
    alora_invocation_tokens: list[int] | None = None
    """Apply the adapter only from the last occurrence of these tokens on (aLoRA)."""
    use_qalora: bool = False
    """A reads sums over groups of inputs, so that group-wise quantised weights can absorb the update (QA-LoRA)."""
    qalora_group_size: int = 16
    """Size of a group of inputs, for QA-LoRA."""
    use_bdlora: Settings | dict[str, Any] | None = None
    """`BdLoraConfig`: one factor of each target is block-diagonal (BD-LoRA)."""
    velora_config: Settings | dict[str, Any] | None = None
    """`VeloraConfig`: keep compressed inputs for the backward pass (VeLoRA)."""
    kasa_config: Settings | dict[str, Any] | None = None
    """`KasaConfig`: replace the smallest singular components of the weight by learned ones (KaSA)."""
    monteclora_config: Settings | dict[str, Any] | None = None
    """`MontecloraConfig`: sample A around its mean during training (MonteCLoRA)."""
    arrow_config: Settings | dict[str, Any] | None = None
    """`ArrowConfig`: route each token among trained LoRA adapters (Arrow)."""

    files = {
        "alora_invocation_tokens": "alora",
        "lora_bias": "lora_bias",
        "use_dora": "dora",
        "kasa_config": "kasa",
        "monteclora_config": "monteclora",
        "velora_config": "velora",
        "use_qalora": "qalora",
        "use_bdlora": "bdlora",
        "mica": "mica",
        "arrow_config": "arrow",
    }
    details = {"qalora_group_size": "use_qalora"}
    starts = "init_lora_weights"
    plain = LoRA
    peft_type = Name("LORA")
    adapter = Composition(LoRA)  # type: ignore[assignment]
    facts = ("alora_offsets",)
    foreign = {"megatron_core": "megatron.core", "loftq_config": {}}
    patterns = ("rank_pattern", "alpha_pattern")

    def __post_init__(self) -> None:
        self.complete_settings()
        super().__post_init__()
        check_range(self, 1, math.inf, "r")
        if "rank_pattern" in self.patterns:
            check_range(self, 1, math.inf, "rank_pattern")
        check_range(self, 0, 1, "lora_dropout")
        variants = self.variants()
        if self.init_lora_weights == "loftq" and variants:
            raise ConfigError(f"{variants[0]} needs the whole weight, which LoftQ replaces by a quantised one")
        self.check_variants()

    def bare_parameters(self) -> Sequence[str]:
        return self.target_parameters or ()

    def ties(self) -> bool:
        return self.ensure_weight_tying

    def members(self) -> Sequence[Config]:
        if not hasattr(self, "_tokens"):
            self._tokens = beside(self.trainable_token_indices)
        return (self, *self._tokens)

    def reshape(self, model: nn.Module) -> Any:
        if not self.layer_replication:
            return None
        return replicate(model, self.layer_replication)

    def __copy__(self) -> LoraConfig:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.__dict__.pop("_tokens", None)  # they follow from fields that the copy may change
        return twin

    def build(self, target: Target, shared: nn.Module | None = None, **kwargs: Any) -> Any:
        from .families.loftq import LoftQ

        if "twin" in kwargs:
            return TiedLoRA(self, target, kwargs["twin"])
        self.check_settings()
        adapter_class: Any = LoftQ if self.init_lora_weights == "loftq" else self.adapter
        adapter = adapter_class(self, target, shared)
        self.check_start(adapter)
        return adapter
