"""Additional adapters under the name of a LoRA: trained tokens, and its update on a module with tied weights."""

from __future__ import annotations

from torch import Tensor

from ...core.adapter import LowRank, Tensors
from ...targets.target import Target
from ..trainable_tokens import TrainableTokens, TrainableTokensConfig


class TokenAdapter(TrainableTokens):
    """Trainable tokens under the name of another method's adapter."""

    key = "token_adapter."

    def export(self) -> Tensors:
        return super().export() if self.shared is None else {}


class Tokens(TrainableTokensConfig):
    """The config that is created from the `trainable_token_indices` of another method's config."""

    adapter = TokenAdapter


def beside(indices: list[int] | dict[str, list[int]] | None) -> list[Tokens]:
    """Configs for tokens that are trained along with another method, in the input embedding or in named modules."""
    if isinstance(indices, dict):
        return [Tokens(token_indices=tokens, target_modules=[module]) for module, tokens in indices.items()]
    if not indices:
        return []
    return [Tokens(token_indices=indices)]


class TiedLoRA(LowRank):
    """Applies an embedding's update, transposed, to the output head that shares its weight, or the reverse."""

    kinds = frozenset({"linear", "embedding"})

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.shared.factors()
        return B.T, A.T

    def names(self) -> tuple[str, str]:
        """The names of A and B in a checkpoint."""
        return _names(self.target)

    def export(self) -> Tensors:
        A, B = self.shared.matrices()
        name_A, name_B = self.names()
        return {name_A: _transposed(B), name_B: _transposed(A)}

    def absorb(self, tensors: Tensors) -> None:
        pass  # the first adapter has already loaded the same values

    def repeats(self) -> dict[str, str]:
        first = self.shared.target
        name_A, name_B = _names(self.target)
        first_A, first_B = _names(first)
        return {name_A: f"{first.path}.{first_B}", name_B: f"{first.path}.{first_A}"}


def _transposed(t: Tensor) -> Tensor:
    return t.detach().T.contiguous()


def _names(target: Target) -> tuple[str, str]:
    """The names of a LoRA's A and B in a checkpoint, by the kind of target."""
    if target.kind == "embedding":
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"
