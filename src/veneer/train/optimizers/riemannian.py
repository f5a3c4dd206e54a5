"""Riemannian preconditioning: gradients of A and B in the metric of their product.

    g_A <- (B^T B + d I)^-1 g_A,  g_B <- g_B (A A^T + d I)^-1

so that a step does not depend on how the product is shared between A and B. Zhang & Pilanci, 2024, arXiv:2402.02347.
Any optimizer follows. Unlike PEFT, convolutions and embeddings are preconditioned too: the formula is the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import VeneerError
from .pairs import Pair, learning, pairs, replace_


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimizer of any kind whose steps precondition the gradients of A and B first.

    Args:
        reg: d, which keeps the inverse small where a factor is (as B is at the start).
        kwargs: for the optimizer.

    Raises:
        VeneerError: the model has no LoRA that learns both factors, or the optimizer evaluates the loss itself.
    """
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise VeneerError(
            f"{optimizer_cls.__name__} computes gradients anew inside its step; use AdamW, SGD or the like"
        )
    found = [p for p in pairs(model) if p.A.requires_grad and p.B.requires_grad and p.lora.target.groups == 1]
    if not found:
        raise VeneerError("no LoRA layer learns both A and B, whose gradients would be preconditioned")
    optimizer = optimizer_cls(learning(model), lr=lr, **kwargs)  # type: ignore[call-arg]
    optimizer.register_step_pre_hook(Preconditioner(found, reg))
    return optimizer


class Preconditioner:
    """A hook before each step."""

    def __init__(self, found: Sequence[Pair], reg: float) -> None:
        self.pairs, self.reg = found, reg

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], kwargs.get("closure"))):
            raise VeneerError(
                "a closure would compute the gradients anew after they were preconditioned; step without one"
            )
        for A, B, _ in self.pairs:
            a, b = A.flatten(1), B.flatten(1)
            if A.grad is not None:
                replace_(A.grad, inverse(b.T, self.reg) @ A.grad.flatten(1).to(wide(b)))
            if B.grad is not None:
                replace_(B.grad, B.grad.flatten(1).to(wide(a)) @ inverse(a, self.reg))


def inverse(M: Tensor, reg: float) -> Tensor:
    """(M M^T + reg I)^-1, or the pseudo-inverse, in at least fp32."""
    M = M.to(wide(M))
    return torch.linalg.pinv(M @ M.T + reg * torch.eye(len(M), dtype=M.dtype, device=M.device), hermitian=True)


def wide(M: Tensor) -> torch.dtype:
    return torch.promote_types(M.dtype, torch.float32)
