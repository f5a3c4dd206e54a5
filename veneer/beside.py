"""Trainable tokens under another method's name: what `trainable_token_indices` asks for."""

from __future__ import annotations

from .core.adapter import Tensors
from .methods.trainable_tokens import TrainableTokens, TrainableTokensConfig


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
