"""Riemannian preconditioning: gradients of A and B in the metric of their product.

    g_A <- (B^T B + d I)^-1 g_A,  g_B <- g_B (A A^T + d I)^-1

A step then does not depend on how the product is split between A and B. Zhang & Pilanci, 2024, arXiv:2402.02347.
Works with any optimizer. Unlike PEFT, convolutions and embeddings are preconditioned too: the formula is the same.
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

REGULARISER = 1e-2
"""The default of d."""


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = REGULARISER, **kwargs: Any
) -> Optimizer:
    """An optimizer of the given class that preconditions the gradients of A and B before each step.

    Args:
        reg: d, which bounds the inverse while a factor is small, such as B at the start.
        kwargs: passed to the optimizer.

    Raises:
        VeneerError: no LoRA layer trains both factors, or the optimizer evaluates the loss itself.
    """
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise VeneerError(
            f"{optimizer_cls.__name__} recomputes the gradients inside its step; use AdamW, SGD or a similar optimizer"
        )
    layers = trained_pairs(model)
    optimizer = optimizer_cls(learning(model), lr=lr, **kwargs)  # type: ignore[call-arg]
    optimizer.register_step_pre_hook(Preconditioner(layers, reg))
    return optimizer


def trained_pairs(model: nn.Module) -> list[Pair]:
    """A and B of the layers that can be preconditioned.

    Raises:
        VeneerError: there are none.
    """
    layers = [pair for pair in pairs(model) if _learns_both(pair)]
    if not layers:
        raise VeneerError("no LoRA layer trains both A and B, so there are no gradients to precondition")
    return layers


def _learns_both(pair: Pair) -> bool:
    """Whether A and B are both trained and the formula applies; grouped convolutions have none."""
    return pair.A.requires_grad and pair.B.requires_grad and pair.lora.target.groups == 1


class Preconditioner:
    """A hook that preconditions the gradients of A and B before each step."""

    def __init__(self, layers: Sequence[Pair], reg: float) -> None:
        self.layers = layers
        self.reg = reg

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closures = (*args[1:], kwargs.get("closure"))
        if any(closure is not None for closure in closures):
            raise VeneerError(
                "a closure would recompute the gradients after they were preconditioned; call step() without a closure"
            )
        for A, B, _ in self.layers:
            a = A.flatten(1)  # (r, in)
            b = B.flatten(1)  # (out, r)
            if A.grad is not None:
                g = A.grad.flatten(1).to(wide(b))
                replace_(A.grad, inverse(b.T, self.reg) @ g)
            if B.grad is not None:
                g = B.grad.flatten(1).to(wide(a))
                replace_(B.grad, g @ inverse(a, self.reg))


def inverse(M: Tensor, reg: float) -> Tensor:
    """(M M^T + reg I)^-1, or the pseudo-inverse of that, in fp32 or wider."""
    M = M.to(wide(M))
    identity = torch.eye(len(M), dtype=M.dtype, device=M.device)
    return torch.linalg.pinv(M @ M.T + reg * identity, hermitian=True)


def wide(M: Tensor) -> torch.dtype:
    """The tensor's dtype, but at least fp32."""
    return torch.promote_types(M.dtype, torch.float32)
