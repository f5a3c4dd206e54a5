"""LoRA-FA: A stays as it is, and B's gradient makes up for that.

    g_B <- g_B (A A^T)^-1 / s^2

the step of B that comes nearest to the full gradient, where the update is s B A. Zhang et al., 2023, arXiv:2308.03303.
A needs no gradient, so the layers' inputs need not be kept for it. AdamW follows: torch's own, where PEFT's adds
epsilon before the bias correction and decays weights after the step, and rounds the product to bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from ...errors import ConfigError, TargetError
from .pairs import Pair, learning, pairs, replace_
from .riemannian import inverse, wide


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """AdamW for a LoRA whose A is frozen from now on.

    Args:
        r, lora_alpha, use_rslora: what the adapter's config says; the layers know their own scaling.

    Raises:
        ConfigError: the config says something else.
        TargetError: some A is zero (on embeddings it starts so), and frozen it would never learn.
    """
    found = pairs(model)
    _check(found, {"r": r, "lora_alpha": lora_alpha, "use_rslora": use_rslora})
    for A, _, lora in found:
        lora.holds_A = True
        A.requires_grad_(False)
        A.grad = None
    optimizer = AdamW(learning(model), lr=lr, eps=1e-6, weight_decay=weight_decay)
    optimizer.register_step_pre_hook(Projection([pair for pair in found if pair.B.requires_grad]))
    return optimizer


def _check(found: Sequence[Pair], given: dict[str, Any]) -> None:
    for A, _, lora in found:
        for field, value in given.items():
            real = getattr(lora.config, field)
            if value is not None and value != real:
                raise ConfigError(f"create_lorafa_optimizer was given {field} = {value}, the adapter has {real}")
        if not A.any():
            raise TargetError(f"A is zero on {lora.target.path!r}; LoRA-FA freezes it, so nothing there would learn")
        if lora.target.groups > 1:
            raise TargetError(f"{lora.target.path!r} is a grouped convolution, for which LoRA-FA has no formula")


class Projection:
    """A hook before each step."""

    def __init__(self, found: Sequence[Pair]) -> None:
        self.pairs = found

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for A, B, lora in self.pairs:
            if B.grad is not None:
                a = A.flatten(1)
                replace_(B.grad, B.grad.flatten(1).to(wide(a)) @ inverse(a, 1e-8) / lora.scaling**2)
