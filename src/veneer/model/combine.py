"""Weighted sums of adapters as one new LoRA adapter.

A sum of adapters is the sum of their updates dW_i, not of their factors: weights may be negative, ranks and methods
may differ. Factor pairs are concatenated along the rank, which is exact, and compressed to the wanted rank by a QR of
both sides and a small SVD. A dense update is computed only to prune it or for a method without factors, one layer at a
time.

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
from ..core.layer import AdapterLayer
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
        model: the model with the adapters, of any methods that are updates of the weights.
        adapters: names of the adapters to add.
        weights: one for each adapter; a negative weight subtracts.
        adapter_name: the name of the new adapter.
        combination_type: "cat" is the exact sum, of rank sum_i r_i (low-rank adapters only); "linear" and "svd" its
            best approximation of rank `svd_rank`; "ties", "dare_linear", "dare_ties" and "magnitude_prune" prune the
            updates before they are added. PEFT's names with the ending "_svd" mean the same here.
        svd_rank: None: the highest rank among the adapters.
        svd_clamp: a quantile; larger factor entries are clamped to it.
        svd_full_matrices: ignored; kept for PEFT compatibility.
        svd_driver: ignored; kept for PEFT compatibility.
        density: the share of entries that pruning keeps.
        majority_sign_method: the sign TIES elects for an entry: of the sum ("total") or of most adapters ("frequency").

    Raises:
        VeneerError: an argument is out of range or names no adapter; the model is unchanged.
        NotMergeable: an adapter is not an update of the weights.
    """
    state = _checked(model, adapters, weights, adapter_name, svd_rank)
    combine = rule(combination_type, density, majority_sign_method)
    rank = svd_rank or max(_rank(state, name) for name in adapters)
    pairs = {}
    for path in _adapted_paths(state, adapters):
        layer = state.layers[path]
        updates = _weighted_updates(layer, adapters, weights)
        layer_rank = min(rank, layer.target.in_features, layer.target.out_features)
        pair = combine(updates, layer_rank, path)
        pairs[path] = clamped(pair, svd_clamp)
    config = lora_config(state.configs[adapters[0]], pairs)
    model.add_adapter(adapter_name, config)
    fill(state, adapter_name, pairs)


def check_weights(adapters: Sequence[str], weights: Sequence[float], rank: int | None) -> None:
    """Check that each adapter has one finite weight and that the rank is positive; raise VeneerError otherwise."""
    if not adapters or len(adapters) != len(weights):
        raise VeneerError(
            f"{len(adapters)} adapters and {len(weights)} weights were given; each adapter needs one weight"
        )
    if len(set(adapters)) < len(adapters):
        raise VeneerError(
            f"adapters = {list(adapters)} names an adapter twice; name it once, with the sum of its weights"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise VeneerError(f"weights must be finite numbers, not {list(weights)}")
    if rank is not None and rank < 1:
        raise VeneerError(f"the rank of the result must be at least 1, not {rank}")


def _checked(model: PeftModel, adapters: Sequence[str], weights: Any, adapter_name: str, rank: int | None) -> State:
    """The model's adapter state, after a check of all arguments."""
    check_weights(adapters, weights, rank)
    if adapter_name in model.peft_config:
        raise VeneerError(f"the model already has an adapter called {adapter_name!r}; choose another name")
    for name in adapters:
        state = adapter_state(model, name)
        for path, adapter in state.adapters(name).items():
            if any(isinstance(part, Replace) for part in adapter.parts):
                raise NotMergeable(f"{name!r} trains a full copy of {path!r}, which a LoRA cannot represent")
    return state


def _rank(state: State, name: str) -> int:
    """The highest rank of an adapter's factors; the rank in its config if it has no factors."""
    ranks = []
    for path in state.adapters(name):
        pair = factors_of(state.layers[path], name)
        if pair is not None:
            A, _ = pair
            ranks.append(A.shape[0])
    if ranks:
        return max(ranks)
    return getattr(state.configs[name], "r", None) or 8


def _adapted_paths(state: State, names: Sequence[str]) -> list[str]:
    """Paths of the layers that hold at least one of the adapters, each path once."""
    paths: dict[str, None] = {}
    for name in names:
        paths |= dict.fromkeys(state.adapters(name))
    return list(paths)


def _weighted_updates(layer: AdapterLayer, names: Sequence[str], weights: Sequence[float]) -> Weighted:
    """The updates of one layer's adapters, each with its weight."""
    updates = []
    for weight, name in zip(weights, names, strict=True):
        if name not in layer.adapters:
            continue
        update = update_of(layer, name)
        if update is not None:
            updates.append((weight, update))
    return updates


# Rules of combination


def rule(kind: str, density: float | None, election: str) -> Callable[[Weighted, int, str], Pair]:
    """The function that combines a module's weighted updates: (updates, rank, path) -> (A, B).

    Args:
        kind: a `combination_type` of `add_weighted_adapter`.
        density: the share of entries that pruning keeps.
        election: "total" or "frequency", for TIES.
    """
    known = ("cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
    plain = kind.removesuffix("_svd")
    is_known = kind in known or (plain in known and plain not in ("cat", "svd", "linear"))
    if not is_known:
        raise VeneerError(f"there is no way to combine called {kind!r}{nearest(kind, known)}; use {', '.join(known)}")
    if plain == "cat":
        return _concatenated
    if plain in ("svd", "linear"):
        return _summed
    if density is None or not 0 < density <= 1:
        given = "none is given" if density is None else f"not {density:g}"
        raise VeneerError(f"{kind} needs a density, the share of entries to keep, above 0 and at most 1; {given}")
    if election not in ("total", "frequency"):
        raise VeneerError(f"TIES elects signs by total or by frequency, not by {election!r}")
    prune = partial(drop if plain.startswith("dare") else trim, density=density)
    if "ties" in plain:
        return partial(_pruned, prune=prune, election=election)
    return partial(_pruned, prune=prune, election=None)


def _concatenated(updates: Weighted, rank: int, path: str) -> Pair:
    pair = _exact_sum(updates)
    if pair is None:
        raise NotMergeable(f"an adapter on {path!r} has no low-rank factors for cat; use svd")
    return pair


def _summed(updates: Weighted, rank: int, path: str) -> Pair:
    pair = _exact_sum(updates)
    if pair is None:
        total: Any = sum(weight * update.matrix() for weight, update in updates)
        pair = truncate(total, rank)
    elif pair[0].shape[0] > rank:
        pair = compress(*pair, rank)
    return padded(*pair, rank)


def _pruned(updates: Weighted, rank: int, path: str, prune: Callable[[Tensor], Tensor], election: str | None) -> Pair:
    D = torch.stack([prune(update.matrix()) for _, update in updates])  # (adapters, out, in)
    weights = torch.tensor([weight for weight, _ in updates], dtype=D.dtype, device=D.device)
    weighted = weights[:, None, None] * D
    total = weighted.sum(0) if election is None else _disjoint_mean(weighted, election)
    return padded(*truncate(total, rank), rank)


def _exact_sum(updates: Weighted) -> Pair | None:
    """sum_i w_i B_i A_i as one pair, exact; None if an update has no factors."""
    As = []
    Bs = []
    for weight, update in updates:
        if update.pair is None:
            return None
        A, B = update.pair
        As.append(A)
        Bs.append(weight * B)
    return torch.cat(As), torch.cat(Bs, dim=1)


def trim(D: Tensor, density: float) -> Tensor:
    """Keep the largest entries by magnitude and set the others to zero."""
    k = max(1, int(density * D.numel()))
    threshold = D.abs().flatten().kthvalue(D.numel() - k + 1).values
    return D * (D.abs() >= threshold)


def drop(D: Tensor, density: float) -> Tensor:
    """Keep a random share of the entries, scaled up so that the mean is preserved (DARE, eq. 1 and 2)."""
    return D * torch.bernoulli(torch.full_like(D, density)) / density


def _disjoint_mean(D: Tensor, election: str) -> Tensor:
    """TIES, sections 3.2 and 3.3: for each entry elect a sign, then average the weighted values of that sign."""
    votes = D if election == "total" else D.sign()
    elected = votes.sum(0).sign()
    agrees = (D.sign() == elected) & (D != 0)
    agreeing_sum = (D * agrees).sum(0)
    return agreeing_sum / agrees.sum(0).clamp_min(1)


# The result


def check_quantile(quantile: float | None) -> None:
    """Raise VeneerError if the quantile to clamp to is out of range."""
    if quantile is not None and not 0 <= quantile <= 1:
        raise VeneerError(f"the quantile to clamp to must be between 0 and 1, not {quantile:g}")


def clamped(pair: Pair, quantile: float | None) -> Pair:
    """The factors, with entries beyond a quantile of their magnitudes clamped to it; None: unchanged."""
    if quantile is None:
        return pair
    check_quantile(quantile)
    A, B = pair
    magnitudes = torch.cat([A.abs().flatten(), B.abs().flatten()])
    limit = float(magnitudes.quantile(quantile))
    return A.clamp(-limit, limit), B.clamp(-limit, limit)


@torch.no_grad()
def fill(state: State, name: str, pairs: dict[str, Pair]) -> None:
    """Copy factor pairs, by path, into the LoRA called `name`."""
    for path, pair in pairs.items():
        lora = state.layers[path].adapters[name]
        for matrix, value in zip(lora.matrices(), pair, strict=True):
            matrix.copy_(value)
