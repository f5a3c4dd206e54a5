"""LoRA-FA: A is frozen, and B's gradient is corrected for it.

    g_B <- g_B (A A^T)^-1 / s^2

This step of B changes the update s B A as closely as possible to the full gradient. Zhang et al., 2023,
arXiv:2308.03303. A needs no gradient, so the layers need not keep their inputs. torch's AdamW then takes the step;
PEFT's own adds epsilon before the bias correction, decays weights after the step, and rounds the product to bf16.
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

EPSILON = 1e-6
"""AdamW's epsilon, as in PEFT."""


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """Freeze A of every active LoRA layer and return AdamW for B.

    Args:
        r: accepted as in PEFT and only compared with the adapter's config.
        lora_alpha: the same.
        use_rslora: the same.

    Raises:
        ConfigError: one of them differs from the adapter's config.
        TargetError: some A is zero, as on embeddings at the start, so its layer would never learn.
    """
    layers = pairs(model)
    _check(layers, {"r": r, "lora_alpha": lora_alpha, "use_rslora": use_rslora})
    freeze_A_(layers)
    optimizer = AdamW(learning(model), lr=lr, eps=EPSILON, weight_decay=weight_decay)
    trained = [layer for layer in layers if layer.B.requires_grad]
    optimizer.register_step_pre_hook(Projection(trained))
    return optimizer


def _check(layers: Sequence[Pair], settings: dict[str, Any]) -> None:
    for _, _, lora in layers:
        for name, value in settings.items():
            actual = getattr(lora.config, name)
            if value is not None and value != actual:
                raise ConfigError(
                    f"create_lorafa_optimizer got {name} = {value}, but the adapter has {actual}; leave it out"
                )


def freeze_A_(layers: Sequence[Pair]) -> None:
    """Freeze A of each layer.

    Raises:
        TargetError: some A is zero, so its layer would never learn, or the formula does not apply.
    """
    for A, _, lora in layers:
        if not A.any():
            raise TargetError(f"A is zero on {lora.target.path!r}; LoRA-FA freezes A, so this layer would never learn")
        if lora.target.groups > 1:
            raise TargetError(f"{lora.target.path!r} is a grouped convolution, which LoRA-FA does not support")
    for A, _, lora in layers:
        lora.holds_A = True
        A.requires_grad_(False)
        A.grad = None


class Projection:
    """A hook that corrects the gradients of B before each step."""

    def __init__(self, layers: Sequence[Pair]) -> None:
        self.layers = layers

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for A, B, lora in self.layers:
            if B.grad is None:
                continue
            a = A.flatten(1)  # (r, in)
            g = B.grad.flatten(1).to(wide(a))  # (out, r)
            replace_(B.grad, g @ inverse(a, 1e-8) / lora.scaling**2)
