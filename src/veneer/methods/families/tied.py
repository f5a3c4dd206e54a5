"""What may stand beside a LoRA under its name: trained tokens, and the same update on a tied module."""

from __future__ import annotations

from torch import Tensor

from ...core.adapter import LowRank, Tensors
from ...targets.target import Target
from ..trainable_tokens import TrainableTokens, TrainableTokensConfig


class TokenAdapter(TrainableTokens):
    """The same beside another method, under its name."""

    key = "token_adapter."

    def export(self) -> Tensors:
        return super().export() if self.shared is None else {}


class Tokens(TrainableTokensConfig):
    """`trainable_token_indices` of another method's config."""

    adapter = TokenAdapter


def beside(indices: list[int] | dict[str, list[int]] | None) -> list[Tokens]:
    """Configs for the tokens that another method also trains: of the embedding, or of the modules it names."""
    if isinstance(indices, dict):
        return [Tokens(token_indices=tokens, target_modules=[module]) for module, tokens in indices.items()]
    return [Tokens(token_indices=indices)] if indices else []


class TiedLoRA(LowRank):
    """The update of an embedding in the output head that shares its weight, or the other way round: its transpose."""

    kinds = frozenset({"linear", "embedding"})

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.shared.factors()
        return B.T, A.T

    def names(self) -> tuple[str, str]:
        """What a file calls A and B here."""
        return _names(self.target)

    def export(self) -> Tensors:
        A, B = self.shared.matrices()
        return {name: t.detach().T.contiguous() for name, t in zip(self.names(), (B, A), strict=True)}

    def absorb(self, tensors: Tensors) -> None:
        pass  # what the first has taken

    def repeats(self) -> dict[str, str]:
        first = self.shared.target
        return {own: f"{first.path}.{its}" for own, its in zip(_names(self.target), _names(first)[::-1], strict=True)}


def _names(target: Target) -> tuple[str, str]:
    """What a LoRA's file calls A and B on a target."""
    if target.kind == "embedding":
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"
