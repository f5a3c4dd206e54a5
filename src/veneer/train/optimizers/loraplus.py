"""LoRA+: B learns faster than A.

    A <- A - lr g_A,  B <- B - ratio lr g_B

Hayou et al., 2024, arXiv:2402.12354: in wide models one rate for both is never efficient; a ratio of about 16 is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ...errors import ConfigError
from .pairs import pairs


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer of any kind with LoRA+'s rates.

    Args:
        lr: the rate of A, and of what else is trained.
        loraplus_lr_ratio: how many times that B learns with (and vectors: biases, DoRA's magnitudes).
        kwargs: for the optimizer, and `loraplus_weight_decay` (0; biases and norms have none) and
            `loraplus_lr_embedding` (1e-6), the rate of A and B on embeddings.

    Raises:
        VeneerError: the model has no active LoRA adapter, or the ratio is not positive.
    """
    if not loraplus_lr_ratio > 0:
        raise ConfigError(f"loraplus_lr_ratio must be above 0, not {loraplus_lr_ratio}")
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    fast = lr * loraplus_lr_ratio
    rates = {"A": (lr, decay), "embedding": (kwargs.pop("loraplus_lr_embedding", 1e-6), decay)}
    rates |= {"B": (fast, decay), "undecayed": (fast, 0.0)}
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    for kind, parameter in _sorted(model):
        groups[kind].append(parameter)
    settings = [{"params": groups[kind], "lr": r, "weight_decay": d} for kind, (r, d) in rates.items()]
    return optimizer_cls(settings, lr=lr, **kwargs)  # type: ignore[call-arg]


def _sorted(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(group, parameter) of all that is trained."""
    found = pairs(model)
    embeddings = {id(p) for pair in found if pair.lora.target.kind == "embedding" for p in pair[:2]}
    B = {id(pair.B) for pair in found}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner = type(modules[name.rpartition(".")[0]]).__name__
        if id(parameter) in embeddings:
            yield "embedding", parameter
        elif id(parameter) in B or parameter.dim() == 1:
            yield ("undecayed" if name.endswith("bias") or "norm" in owner.lower() else "B"), parameter
        else:
            yield "A", parameter
