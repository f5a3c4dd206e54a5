"""VB-LoRA: compose the low-rank factors of all layers from one learned bank of short vectors.

    W' = W + B A;  each stretch of A's rows and of B's columns is  sum_i w_i bank[j_i],  j the places of its k largest
    logits, w their softmax

Li et al., 2024, arXiv:2405.15179. Trainable: vectors x length, shared, and vectors r (in + out) / length per target.
Mergeable. Starts near a no-op: the bank is small.

`save_only_topk_weights` writes j and w instead of all logits. Such a file can be used, but not trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import LowRank, Tensors
from ..core.config import LayerConfig, Name, check_range
from ..errors import CheckpointError, ConfigError, TargetError
from ..targets.target import Target

SIDES = ("vblora_logits_A", "vblora_logits_B")


class VBLoRA(LowRank):
    def __init__(self, config: VBLoRAConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.r, self.k = config.r, config.topk
        self.is_final = config.save_only_topk_weights and config.inference_mode  # a file's: there are no logits
        length, ins, outs = config.vector_length, target.in_features, target.out_features
        if ins % length or outs % length:
            raise TargetError(f"vector_length {length} on {target.path!r} must divide in = {ins} and out = {outs}")
        for name, shape in zip(SIDES, ((self.r, ins // length), (outs // length, self.r)), strict=True):
            if self.is_final:
                self.register_buffer(f"{name}_topk_indices", torch.zeros(*shape, self.k, dtype=torch.int64))
                self.register_buffer(f"{name}_topk_weights", torch.zeros(*shape, self.k - 1))
            else:
                setattr(self, name, nn.Parameter(torch.randn(*shape, config.num_vectors) * config.init_logits_std))
        self.set_dropout(config.vblora_dropout)

    def choice(self, name: str) -> tuple[Tensor, Tensor]:
        """Places (..., k) of the bank's vectors, and the weights (..., k - 1) of all but the last."""
        if self.is_final:
            return getattr(self, f"{name}_topk_indices"), getattr(self, f"{name}_topk_weights")
        top, places = getattr(self, name).topk(self.k)
        n = self.config.num_vectors
        places = places.to(torch.uint8 if n < 2**8 else torch.int16 if n < 2**15 else torch.int32)
        return places, top.softmax(-1)[..., :-1]

    def stretches(self, name: str) -> Tensor:
        """The composed vectors of one side, (..., length)."""
        places, weights = self.choice(name)
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
        return torch.einsum("...k,...kl->...l", weights, self.shared.vblora_vector_bank[places.long()].to(weights))

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = map(self.stretches, SIDES)  # (r, in / length, length), (out / length, r, length)
        return A.flatten(1), B.transpose(1, 2).flatten(0, 1)

    def export(self) -> Tensors:
        if self.is_final or not self.config.save_only_topk_weights:
            return self.state_dict()
        parts = ("indices", "weights")
        return {f"{name}_topk_{p}": t for name in SIDES for p, t in zip(parts, self.choice(name), strict=True)}

    def absorb(self, tensors: Tensors) -> None:
        if self.config.save_only_topk_weights and not self.is_final:
            raise CheckpointError(
                "the file holds only the chosen vectors, from which the logits cannot be recovered: load it with "
                "is_trainable=False, or train with save_only_topk_weights=False to be able to resume"
            )
        for key, t in tensors.items():
            if "indices" in key and not 0 <= t.min() <= t.max() < self.config.num_vectors:
                raise CheckpointError(f"{key} on {self.target.path!r} points outside the bank")
        super().absorb(tensors)

    def expected_parameters(self) -> int:
        stretches = self.r * (self.target.in_features + self.target.out_features) // self.config.vector_length
        return 0 if self.is_final else stretches * self.config.num_vectors

    def describe(self) -> str:
        return f"r={self.r}, top {self.k}"


@dataclass(kw_only=True)
class VBLoRAConfig(LayerConfig):
    r: int = 4
    """Rank of the update."""
    num_vectors: int = 256
    """Vectors in the bank; more for larger models."""
    vector_length: int = 256
    """Length of a vector; it divides in and out of every target."""
    topk: int = 2
    """k: how many vectors a stretch is mixed from."""
    save_only_topk_weights: bool = False
    """Write the chosen vectors' places and weights instead of all logits: small, but not to be trained on."""
    vblora_dropout: float = 0.0
    """Dropout on the input of the update, in training."""
    init_vector_bank_bound: float = 0.02
    """The bank starts uniform between minus this and this; zero would never learn."""
    init_logits_std: float = 0.1
    """Standard deviation of the logits at the start."""

    peft_type, adapter = Name("VBLORA"), VBLoRA
    learning_rate, recommended = 1e-2, {"vector_length": 64}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "r", "num_vectors", "vector_length", "topk")
        check_range(self, 0, 1, "vblora_dropout")
        if self.topk > self.num_vectors:
            raise ConfigError(f"topk {self.topk} must be at most num_vectors = {self.num_vectors}")

    def build_shared(self, targets: Sequence[Target]) -> nn.ParameterDict:
        bank, bound = torch.empty(self.num_vectors, self.vector_length), self.init_vector_bank_bound
        return nn.ParameterDict({"vblora_vector_bank": bank.uniform_(-bound, bound)})
