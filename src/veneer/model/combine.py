"""Weighted sums of adapters as one new LoRA adapter.

A sum of adapters is the sum of their updates dW_i, not of their factors: weights may be negative, ranks and methods
may differ. Factor pairs are put side by side, which is exact, and brought to the wanted rank by a QR of both sides and
a small SVD; a dense update is formed only for a method without factors, or to prune it, one layer at a time.

TIES: Yadav et al., 2023, arXiv:2306.01708; DARE: Yu et al., 2023, arXiv:2311.03099.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Replace
from ..core.state import State
from ..errors import NotMergeable, VeneerError, nearest
from ..maths.low_rank import Pair, compress, padded, truncate
from .peft_model import PeftModel
from .to_lora import Update, adapter_state, factors_of, lora_config, update_of

Weighted = Sequence[tuple[float, Update]]


def add_weighted_adapter(
    model: PeftModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Add the adapter sum_i weights_i dW_i, a plain LoRA, to a model.

    Args:
        model: holds the adapters; they may be of any methods that are updates of the weights.
        adapters: names.
        weights: one for each; negative ones subtract.
        adapter_name: of the new adapter.
        combination_type: "cat" is the exact sum, of rank sum_i r_i (low-rank adapters only); "linear" and "svd" its
            best approximation of rank `svd_rank`; "ties", "dare_linear", "dare_ties" and "magnitude_prune" prune the
            updates before they are added. The endings "_svd" of PEFT mean the same here.
        svd_rank: None: the highest rank among the adapters.
        svd_clamp: a quantile; larger factor entries are clamped to it.
        svd_full_matrices: PEFT's; the result does not depend on it.
        svd_driver: PEFT's; the same.
        density: the share of entries that pruning keeps.
        majority_sign_method: the sign TIES elects for an entry: of the sum ("total") or of most adapters ("frequency").

    Raises:
        VeneerError: an argument is out of range, or names no adapter; nothing is changed.
        NotMergeable: an adapter is no update of the weights.
    """
    state = _checked(model, adapters, weights, adapter_name, svd_rank)
    how = rule(combination_type, density, majority_sign_method)
    rank = svd_rank or max(_rank(state, name) for name in adapters)
    pairs = {}
    for path in dict.fromkeys(path for name in adapters for path in state.adapters(name)):
        layer = state.layers[path]
        names = [(w, name) for w, name in zip(weights, adapters, strict=True) if name in layer.adapters]
        updates = [(w, u) for w, name in names if (u := update_of(layer, name)) is not None]
        pairs[path] = clamped(how(updates, min(rank, *_sizes(layer.target)), path), svd_clamp)
    config = lora_config(state.configs[adapters[0]], pairs)
    model.add_adapter(adapter_name, config)
    fill(state, adapter_name, pairs)


def check_weights(adapters: Sequence[str], weights: Sequence[float], rank: int | None) -> None:
    """Raise VeneerError unless each adapter has one weight, a number, and the rank is one."""
    if not adapters or len(adapters) != len(weights):
        raise VeneerError(
            f"{len(adapters)} adapters and {len(weights)} weights were given; each adapter needs one weight"
        )
    if len(set(adapters)) < len(adapters):
        raise VeneerError(f"adapters = {list(adapters)} names one twice; give it the sum of its weights")
    if not all(math.isfinite(weight) for weight in weights):
        raise VeneerError(f"weights must be finite numbers, not {list(weights)}")
    if rank is not None and rank < 1:
        raise VeneerError(f"svd_rank must be at least 1, not {rank}")


def _checked(model: PeftModel, adapters: Sequence[str], weights: Any, adapter_name: str, rank: int | None) -> State:
    check_weights(adapters, weights, rank)
    if adapter_name in model.peft_config:
        raise VeneerError(f"the model already has an adapter called {adapter_name!r}; choose another name")
    for name in adapters:
        state = adapter_state(model, name)
        for path, adapter in state.adapters(name).items():
            if any(isinstance(part, Replace) for part in adapter.parts):
                raise NotMergeable(f"{name!r} trains a whole copy of {path!r}, which a LoRA does not hold")
    return state


def _rank(state: State, name: str) -> int:
    """The highest rank of an adapter's factors; of one without factors, the rank in its config."""
    pairs = (factors_of(state.layers[path], name) for path in state.adapters(name))
    ranks = [A.shape[0] for A, _ in filter(None, pairs)]
    return max(ranks, default=getattr(state.configs[name], "r", None) or 8)


def _sizes(target: Any) -> tuple[int, int]:
    return target.in_features, target.out_features


# How updates become one


def rule(kind: str, density: float | None, election: str) -> Callable[[Weighted, int, str], Pair]:
    """What makes one pair of the weighted updates of a module: (updates, rank, path) -> (A, B). See above for kinds."""
    known = ("cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
    plain = kind.removesuffix("_svd")
    if plain not in known or plain in ("cat", "svd", "linear") and plain != kind:
        raise VeneerError(f"combination_type {kind!r} is unknown; use one of {', '.join(known)}{nearest(kind, known)}")
    if plain == "cat":
        return _concatenated
    if plain in ("svd", "linear"):
        return _summed
    if density is None or not 0 < density <= 1:
        raise VeneerError(f"{kind!r} needs density, the share of entries to keep, in (0, 1]; not {density!r}")
    if election not in ("total", "frequency"):
        raise VeneerError(f'majority_sign_method must be "total" or "frequency", not {election!r}')
    prune = drop if plain.startswith("dare") else trim
    return partial(_pruned, prune=partial(prune, density=density), election=election if "ties" in plain else None)


def _concatenated(updates: Weighted, rank: int, path: str) -> Pair:
    pair = _side_by_side(updates)
    if pair is None:
        raise NotMergeable(f"an adapter on {path!r} has no factors to put side by side; use combination_type='svd'")
    return pair


def _summed(updates: Weighted, rank: int, path: str) -> Pair:
    pair = _side_by_side(updates)
    if pair is None:
        return padded(*truncate(sum(w * u.matrix() for w, u in updates), rank), rank)  # type: ignore[arg-type]
    return padded(*(pair if pair[0].shape[0] <= rank else compress(*pair, rank)), rank)


def _pruned(updates: Weighted, rank: int, path: str, prune: Callable[[Tensor], Tensor], election: str | None) -> Pair:
    D = torch.stack([prune(u.matrix()) for _, u in updates])
    W = torch.tensor([w for w, _ in updates], dtype=D.dtype, device=D.device)[:, None, None]
    total = (W * D).sum(0) if election is None else _disjoint_mean(W * D, election)
    return padded(*truncate(total, rank), rank)


def _side_by_side(updates: Weighted) -> Pair | None:
    """sum_i w_i B_i A_i as one pair: exact."""
    pairs = [(w, u.pair) for w, u in updates]
    if any(pair is None for _, pair in pairs):
        return None
    return torch.cat([p[0] for _, p in pairs if p]), torch.cat([w * p[1] for w, p in pairs if p], dim=1)


def trim(D: Tensor, density: float) -> Tensor:
    """Only the largest entries."""
    k = max(1, int(density * D.numel()))
    threshold = D.abs().flatten().kthvalue(D.numel() - k + 1).values
    return D * (D.abs() >= threshold)


def drop(D: Tensor, density: float) -> Tensor:
    """A random share of the entries, larger by what went, so that the mean stays (DARE, eq. 1 and 2)."""
    return D * torch.bernoulli(torch.full_like(D, density)) / density


def _disjoint_mean(D: Tensor, election: str) -> Tensor:
    """TIES, sections 3.2 and 3.3: for each entry elect a sign, then average the weighted values that have it."""
    sign = (D if election == "total" else D.sign()).sum(0).sign()
    agrees = (D.sign() == sign) & (D != 0)
    return (D * agrees).sum(0) / agrees.sum(0).clamp_min(1)


# The result


def clamped(pair: Pair, quantile: float | None) -> Pair:
    if quantile is None:
        return pair
    limit = float(torch.cat([t.abs().flatten() for t in pair]).quantile(quantile))
    return pair[0].clamp(-limit, limit), pair[1].clamp(-limit, limit)


@torch.no_grad()
def fill(state: State, name: str, pairs: dict[str, Pair]) -> None:
    for path, pair in pairs.items():
        for mine, value in zip(state.layers[path].adapters[name].matrices(), pair, strict=True):
            mine.copy_(value)
