"""PEFT's functions that merge the tensors of several tasks, built on veneer's combination of adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import VeneerError
from ..model.combine import drop, trim

Tasks = Sequence[Tensor] | Tensor
"""One tensor per task, all of the same shape."""


def prune(tensor: Tensor, density: float, method: str, rescale: bool = False) -> Tensor:
    """Keep a fraction of a tensor's entries and set the others to 0.

    Args:
        density: the fraction that is kept.
        method: "magnitude" keeps the largest entries, "random" keeps random ones.
        rescale: divide what "random" keeps by the density.
    """
    if density >= 1:
        return tensor
    if density < 0:
        raise VeneerError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return trim(tensor, density)
    if method == "random":
        rescaled = drop(tensor, density)
        return rescaled * (1.0 if rescale else density)
    raise VeneerError(f"Unknown method {method}")


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """Keep a share of the values, the largest ones."""
    return prune(tensor, density, "magnitude")


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Keep each value with a probability, and divide by it if `rescale`."""
    return prune(tensor, density, "random", rescale)


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """Weights, one for each task, in a shape that broadcasts over the tasks' tensors."""
    ones = (1,) * (task_tensors.dim() - weights.dim())
    return weights.reshape(*weights.shape, *ones)


def calculate_majority_sign_mask(tensor: Tensor, method: str = "total") -> Tensor:
    """Mask of the entries with the elected sign: that of the sum ("total") or of the majority ("frequency")."""
    if method not in ("total", "frequency"):
        raise RuntimeError(f'Unimplemented mask method "{method}"')
    signs = tensor.sign()
    votes = tensor.sum(0) if method == "total" else signs.sum(0)
    elected = torch.where(votes >= 0, 1, -1)
    return signs == elected


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean over the tasks whose sign was elected."""
    total = (task_tensors * majority_sign_mask).sum(0)
    count = majority_sign_mask.sum(0).clamp_min(1.0)
    return total / count


def task_arithmetic(task_tensors: Tasks, weights: Tensor) -> Tensor:
    """The weighted sum of the tensors."""
    return _weighted(task_tensors, weights).sum(0)


def magnitude_prune(task_tensors: Tasks, weights: Tensor, density: float) -> Tensor:
    """The weighted sum of the largest entries of each tensor."""
    pruned = _pruned(task_tensors, density, trim)
    return _weighted(pruned, weights).sum(0)


def dare_linear(task_tensors: Tasks, weights: Tensor, density: float) -> Tensor:
    """The weighted sum of random entries of each tensor, rescaled (DARE)."""
    pruned = _pruned(task_tensors, density, drop)
    return _weighted(pruned, weights).sum(0)


def ties(task_tensors: Tasks, weights: Tensor, density: float, majority_sign_method: str = "total") -> Tensor:
    """The weighted mean of the largest entries over the tasks whose sign was elected (TIES)."""
    pruned = _pruned(task_tensors, density, trim)
    return _elected(pruned, weights, majority_sign_method)


def dare_ties(task_tensors: Tasks, weights: Tensor, density: float, majority_sign_method: str = "total") -> Tensor:
    """The weighted mean of random entries, rescaled, over the tasks whose sign was elected (DARE with TIES)."""
    pruned = _pruned(task_tensors, density, drop)
    return _elected(pruned, weights, majority_sign_method)


def _elected(D: Tensor, weights: Tensor, method: str) -> Tensor:
    """Merge by elected sign; as in PEFT the signs are elected before the weights are applied."""
    weighted = _weighted(D, weights)
    mask = calculate_majority_sign_mask(D, method)
    return disjoint_merge(weighted, mask)


def _pruned(task_tensors: Tasks, density: float, prune_one: Callable[[Tensor, float], Tensor]) -> Tensor:
    """(tasks, ...) with each task's tensor pruned separately."""
    pruned = [tensor if density >= 1 else prune_one(tensor, density) for tensor in task_tensors]
    return torch.stack(pruned)


def _weighted(task_tensors: Tasks, weights: Tensor) -> Tensor:
    D = torch.stack(tuple(task_tensors))  # (tasks, ...)
    trailing = (1,) * (D.dim() - 1)
    return D * weights.view(-1, *trailing)
