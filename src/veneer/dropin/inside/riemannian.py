"""`peft.optimizers.riemannian`: an optimizer whose steps do not depend on how an update is split between A and B."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ...core.state import state_of
from ...errors import VeneerError
from ...train.optimizers import riemannian
from ...train.optimizers.pairs import pairs
from ..wording import pefts_words


@pefts_words()
def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimizer of the given class that preconditions the gradients of A and B before each step.

    Raises:
        TypeError: `optimizer_cls` is not an optimizer.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    if not _collect_lora_pairs(model):
        raise VeneerError(
            "create_riemannian_optimizer did not find any trainable lora_A/lora_B parameter pairs on the model; it "
            "trains the factors of LoRA"
        )
    optimizer = riemannian.create_riemannian_optimizer(model, optimizer_cls, lr=lr, reg=reg, **kwargs)
    optimizer.step = pefts_words()(optimizer.step)  # type: ignore[method-assign]
    return optimizer


def _collect_lora_pairs(model: Any) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The trained A and B of each linear layer."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if state_of(base) is None:
        return []
    collected = []
    for A, B, lora in pairs(model):
        if lora.target.kind == "linear" and A.requires_grad and B.requires_grad:
            collected.append((A, B))
    return collected


class _RiemannianPreconditioner:
    """Preconditions the gradients of pairs (A, B), in place."""

    def __init__(self, lora_pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], reg: float) -> None:
        self.lora_pairs = lora_pairs
        self.reg = reg

    def step(self) -> None:
        layers: Any = [(A, B, SimpleNamespace()) for A, B in self.lora_pairs]
        riemannian.Preconditioner(layers, self.reg)(None, (), {})  # type: ignore[arg-type]
