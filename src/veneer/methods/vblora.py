"""VB-LoRA: compose the low-rank factors of all layers from one learned bank of short vectors.

    W' = W + B A;  each segment of A's rows and of B's columns is  sum_i w_i bank[j_i],  j: the indices of its k largest
    logits, w: their softmax

Li et al., 2024, arXiv:2405.15179. Trainable: vectors x length, shared, and vectors r (in + out) / length per target.
Mergeable. Starts near a no-op: the values in the bank are small.

`save_only_topk_weights` writes j and w instead of all logits. Such a file can be used, but its training cannot be
resumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import LowRank, Tensors
from ..core.config import LayerConfig, Name, check_range
from ..errors import CheckpointError, ConfigError, NotResumable, TargetError
from ..targets.target import Target


def index_dtype(n: int) -> torch.dtype:
    """The dtype of indices into a bank of n vectors, as in PEFT's files."""
    if n < 2**8:
        return torch.uint8
    if n < 2**15:
        return torch.int16
    return torch.int32


class VBLoRA(LowRank):
    def __init__(self, config: VBLoRAConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r = config.r
        self.k = config.topk
        self.has_logits = not (config.save_only_topk_weights and config.inference_mode)
        length = config.vector_length
        ins = target.in_features
        outs = target.out_features
        if ins % length or outs % length:
            raise TargetError(f"vector_length {length} on {target.path!r} must divide in = {ins} and out = {outs}")
        self._add_choice("vblora_logits_A", self.r, ins // length)
        self._add_choice("vblora_logits_B", outs // length, self.r)
        self.set_dropout(config.vblora_dropout)

    def _add_choice(self, name: str, *shape: int) -> None:
        """Register what chooses the vectors of one side: logits or, for a file without them, indices and weights."""
        if self.has_logits:
            logits = torch.randn(*shape, self.config.num_vectors) * self.config.init_logits_std
            self.register_parameter(name, nn.Parameter(logits))
        else:
            indices = torch.zeros(*shape, self.k, dtype=torch.int64)
            weights = torch.zeros(*shape, self.k - 1)
            self.register_buffer(f"{name}_topk_indices", indices)
            self.register_buffer(f"{name}_topk_weights", weights)

    def choice(self, name: str) -> tuple[Tensor, Tensor]:
        """Indices (..., k) of the chosen vectors, and the weights (..., k - 1) of all but the last."""
        if not self.has_logits:
            return getattr(self, f"{name}_topk_indices"), getattr(self, f"{name}_topk_weights")
        logits, indices = getattr(self, name).topk(self.k)
        indices = indices.to(index_dtype(self.config.num_vectors))
        return indices, logits.softmax(-1)[..., :-1]

    def segments(self, name: str) -> Tensor:
        """The composed vectors of one side, (..., length)."""
        indices, weights = self.choice(name)
        last = 1 - weights.sum(-1, keepdim=True)
        weights = torch.cat([weights, last], dim=-1)
        vectors = self.shared.vblora_vector_bank[indices.long()].to(weights)
        return torch.einsum("...k,...kl->...l", weights, vectors)

    def factors(self) -> tuple[Tensor, Tensor]:
        A = self.segments("vblora_logits_A")  # (r, in / length, length)
        B = self.segments("vblora_logits_B")  # (out / length, r, length)
        return A.flatten(1), B.transpose(1, 2).flatten(0, 1)

    def export(self) -> Tensors:
        if not self.has_logits or not self.config.save_only_topk_weights:
            return self.state_dict()
        tensors = {}
        for name in ("vblora_logits_A", "vblora_logits_B"):
            indices, weights = self.choice(name)
            tensors[f"{name}_topk_indices"] = indices
            tensors[f"{name}_topk_weights"] = weights
        return tensors

    def remainder(self) -> Tensors:
        """The logits, if the file holds only what they choose."""
        return self.state_dict() if self.has_logits and self.config.save_only_topk_weights else {}

    def absorb(self, tensors: Tensors) -> None:
        has_lost = self.config.save_only_topk_weights and self.has_logits and "vblora_logits_A" not in tensors
        if has_lost:
            raise NotResumable.because("the chosen vectors", "the logits", "save_only_topk_weights=False")
        for key, tensor in tensors.items():
            if "indices" in key and not 0 <= tensor.min() <= tensor.max() < self.config.num_vectors:
                raise CheckpointError(f"{key} on {self.target.path!r} points outside the bank")
        super().absorb(tensors)

    def expected_parameters(self) -> int:
        if not self.has_logits:
            return 0
        entries = self.r * (self.target.in_features + self.target.out_features)
        segments = entries // self.config.vector_length
        return segments * self.config.num_vectors

    def describe(self) -> str:
        return f"r={self.r}, top {self.k}"


@dataclass(kw_only=True)
class VBLoRAConfig(LayerConfig):
    r: int = 4
    """Rank of the update."""
    num_vectors: int = 256
    """Number of vectors in the bank. Larger models need more vectors."""
    vector_length: int = 256
    """Length of a vector; must divide the input and output sizes of every target."""
    topk: int = 2
    """k: number of vectors that are mixed for each segment."""
    save_only_topk_weights: bool = False
    """Write the chosen vectors' indices and weights instead of all logits: smaller. The logits are in the
    file beside it, which only training reads."""
    vblora_dropout: float = 0.0
    """Dropout on the input of the update during training."""
    init_vector_bank_bound: float = 0.02
    """Bound b of the bank's uniform start in [-b, b]. With a start at zero, the bank would never learn."""
    init_logits_std: float = 0.1
    """Initial standard deviation of the logits."""

    peft_type = Name("VBLORA")
    adapter = VBLoRA
    learning_rate = 1e-2
    recommended = {"vector_length": 64}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "num_vectors", "vector_length", "topk")
        check_range(self, 0, 1, "vblora_dropout")
        if self.topk > self.num_vectors:
            raise ConfigError(f"topk {self.topk} must be at most num_vectors = {self.num_vectors}")

    def build_shared(self, targets: Sequence[Target]) -> nn.ParameterDict:
        bound = self.init_vector_bank_bound
        bank = torch.empty(self.num_vectors, self.vector_length).uniform_(-bound, bound)
        return nn.ParameterDict({"vblora_vector_bank": bank})
