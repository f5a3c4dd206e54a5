"""LoRA+: B learns faster than A.

    A <- A - lr g_A,  B <- B - ratio lr g_B

Hayou et al., 2024, arXiv:2402.12354: in wide models a single rate is never efficient; a ratio of about 16 is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ...errors import ConfigError
from .pairs import pairs

EMBEDDING_RATE = 1e-6
"""The learning rate of A and B on embeddings, as in PEFT."""


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer of the given class with LoRA+'s learning rates.

    Args:
        lr: learning rate of A and of all other trained parameters.
        loraplus_lr_ratio: B, and vectors such as biases and DoRA's magnitudes, learn at this multiple of `lr`.
        kwargs: passed to the optimizer, except `loraplus_weight_decay` (0; biases and norms are never decayed) and
            `loraplus_lr_embedding` (1e-6), the learning rate of A and B on embeddings.

    Raises:
        VeneerError: the model has no active LoRA adapter, or the ratio is not positive.
    """
    if not loraplus_lr_ratio > 0:
        raise ConfigError(f"loraplus_lr_ratio must be above 0, not {loraplus_lr_ratio}")
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    embedding_lr = kwargs.pop("loraplus_lr_embedding", EMBEDDING_RATE)
    fast_lr = lr * loraplus_lr_ratio
    groups: dict[str, dict[str, Any]] = {
        "A": {"params": [], "lr": lr, "weight_decay": decay},
        "embedding": {"params": [], "lr": embedding_lr, "weight_decay": decay},
        "B": {"params": [], "lr": fast_lr, "weight_decay": decay},
        "undecayed": {"params": [], "lr": fast_lr, "weight_decay": 0.0},
    }
    for group, parameter in grouped(model):
        groups[group]["params"].append(parameter)
    return optimizer_cls(list(groups.values()), lr=lr, **kwargs)  # type: ignore[call-arg]


def grouped(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(group, parameter) for each trained parameter."""
    B_ids = set()
    embedding_ids = set()
    for A, B, lora in pairs(model):
        B_ids.add(id(B))
        if lora.target.kind == "embedding":
            embedding_ids |= {id(A), id(B)}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module = modules[name.rpartition(".")[0]]
        is_norm = "norm" in type(module).__name__.lower()
        if id(parameter) in embedding_ids:
            yield "embedding", parameter
        elif id(parameter) not in B_ids and parameter.dim() != 1:
            yield "A", parameter
        elif is_norm or name.endswith("bias"):
            yield "undecayed", parameter
        else:
            yield "B", parameter
