"""PEFT's functions that merge tensors of several tasks, over those that combine adapters here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import VeneerError
from ..model.combine import drop, trim

Tasks = Sequence[Tensor] | Tensor
"""A tensor for each task, of one shape."""


def prune(tensor: Tensor, density: float, method: str, rescale: bool = False) -> Tensor:
    """A share of a tensor's entries: the largest ("magnitude") or any ("random"), perhaps larger by what went."""
    if density >= 1:
        return tensor
    if density < 0:
        raise VeneerError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return trim(tensor, density)
    if method == "random":
        return drop(tensor, density) * (1.0 if rescale else density)
    raise VeneerError(f"Unknown method {method}")


def calculate_majority_sign_mask(tensor: Tensor, method: str = "total") -> Tensor:
    """Where each task's entry has the sign that is elected: of the sum ("total") or of most ("frequency")."""
    if method not in ("total", "frequency"):
        raise RuntimeError(f'Unimplemented mask method "{method}"')
    votes = (tensor if method == "total" else tensor.sign()).sum(0)
    return tensor.sign() == torch.where(votes >= 0, 1, -1)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean over the tasks whose sign was elected."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp_min(1.0)


def task_arithmetic(task_tensors: Tasks, weights: Tensor) -> Tensor:
    """The weighted sum."""
    return _weighted(task_tensors, weights).sum(0)


def magnitude_prune(task_tensors: Tasks, weights: Tensor, density: float) -> Tensor:
    """The weighted sum of what is largest in each."""
    return _weighted(_pruned(task_tensors, density, trim), weights).sum(0)


def dare_linear(task_tensors: Tasks, weights: Tensor, density: float) -> Tensor:
    """The weighted sum of a random share of each, rescaled (DARE)."""
    return _weighted(_pruned(task_tensors, density, drop), weights).sum(0)


def ties(task_tensors: Tasks, weights: Tensor, density: float, majority_sign_method: str = "total") -> Tensor:
    """The mean of the weighted largest entries over the tasks of the elected sign (TIES)."""
    return _elected(_pruned(task_tensors, density, trim), weights, majority_sign_method)


def dare_ties(task_tensors: Tasks, weights: Tensor, density: float, majority_sign_method: str = "total") -> Tensor:
    """The same of a random share of each, rescaled."""
    return _elected(_pruned(task_tensors, density, drop), weights, majority_sign_method)


def _elected(D: Tensor, weights: Tensor, method: str) -> Tensor:
    """As PEFT the signs are elected before the weights come in."""
    return disjoint_merge(_weighted(D, weights), calculate_majority_sign_mask(D, method))


def _pruned(task_tensors: Tasks, density: float, how: Callable[[Tensor, float], Tensor]) -> Tensor:
    return torch.stack([t if density >= 1 else how(t, density) for t in task_tensors])


def _weighted(task_tensors: Tasks, weights: Tensor) -> Tensor:
    D = torch.stack(tuple(task_tensors))
    return D * weights.view(-1, *(1,) * (D.dim() - 1))
