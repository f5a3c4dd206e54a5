"""Weighted sums of adapters on disk. LoRAs are combined from their files alone; other methods need the base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import checkpoint
from ..core.config import Config
from ..errors import BaseMismatch, CheckpointError, ConfigError, NotMergeable
from ..files.read import PREFIX
from ..files.write import appearing, claimed
from ..formats import peft
from ..formats.lora import Hints, Lora
from ..maths.low_rank import Pair
from ..model.combine import Weighted, add_weighted_adapter, check_quantile, check_weights, clamped, rule
from ..model.to_lora import Update, lora_config
from .merge import on_files


@dataclass(frozen=True)
class Combination:
    """What was combined."""

    out: str
    adapters: list[str]
    weights: list[float]
    method: str
    with_base: bool
    """Whether the base model had to be read."""
    modules: int
    rank: int
    """The highest rank of all modules."""

    def as_dict(self) -> dict[str, Any]:
        return vars(self)


@dataclass(frozen=True)
class Settings:
    """How updates are combined; see `add_weighted_adapter`."""

    method: str
    rank: int | None
    density: float | None
    election: str
    clamp: float | None


def combine(
    adapters: Sequence[str],
    weights: Sequence[float],
    out: str | Path,
    method: str = "svd",
    rank: int | None = None,
    density: float | None = None,
    election: str = "total",
    clamp: float | None = None,
    model: str | None = None,
    seed: int = 0,
) -> Combination:
    """Write the adapter sum_i weights_i dW_i, a plain LoRA.

    Args:
        adapters: directories.
        out: a directory that does not exist yet, or is empty.
        method, rank, density, election, clamp: `combination_type`, `svd_rank`, `density`, `majority_sign_method` and
            `svd_clamp` of `add_weighted_adapter`.
        model: the base, used if an adapter is not a LoRA; None: the one that the adapters name.
        seed: seed for the entries that DARE drops.

    Raises:
        VeneerError: an argument is out of range, or an adapter is not a weight update; nothing is written.
    """
    with claimed(Path(out)):
        check_weights(adapters, weights, rank)
        rule(method, density, election)
        check_quantile(clamp)
        settings = Settings(method, rank, density, election, clamp)
        configs = [Config.from_pretrained(adapter) for adapter in adapters]
        with_base = not all(_is_plain(config) for config in configs)
        write = _on_base if with_base else _from_files
        with appearing(Path(out)) as folder, torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            write(adapters, weights, folder, settings, model)
            combined = peft.read(folder, Hints()).check(folder)
    ranks = [pair.r for pair in combined.pairs.values()]
    return Combination(str(out), [*adapters], [*weights], method, with_base, len(ranks), max(ranks))


def _is_plain(config: Config) -> bool:
    """Whether an adapter is a LoRA that can be summed from its files."""
    try:
        peft.check_plain(config)
    except ConfigError:
        return False
    return True


# From the adapters' files alone


def _from_files(
    adapters: Sequence[str], weights: Sequence[float], folder: Path, settings: Settings, model: str | None
) -> None:
    loras = [peft.read(Path(adapter), Hints()).check(Path(adapter)) for adapter in adapters]
    configs = [Config.from_pretrained(adapter) for adapter in adapters]
    _check_bases(adapters)
    pairs = _combined(loras, weights, settings)
    config = lora_config(configs[0], pairs)
    config.base_model_name_or_path = model or configs[0].base_model_name_or_path
    config.inference_mode = True
    _, provenance = checkpoint.read(adapters[0])
    checkpoint.write(folder, _tensors(loras, pairs), provenance, config)


def _combined(loras: Sequence[Lora], weights: Sequence[float], settings: Settings) -> dict[str, Pair]:
    """The combined factors of each module."""
    combine_updates = rule(settings.method, settings.density, settings.election)
    rank = settings.rank
    if not rank:
        rank = max(_highest_rank(lora) for lora in loras)
    paths: dict[str, None] = {}
    for lora in loras:
        paths |= dict.fromkeys(lora.pairs)
    pairs = {}
    for path in paths:
        updates = _updates(loras, weights, path)
        in_features, out_features = _sizes(path, updates)
        pair = combine_updates(updates, min(rank, in_features, out_features), path)
        pairs[path] = clamped(pair, settings.clamp)
    return pairs


def _highest_rank(lora: Lora) -> int:
    return max(pair.r for pair in lora.pairs.values())


def _tensors(loras: Sequence[Lora], pairs: dict[str, Pair]) -> dict[str, Tensor]:
    """The tensors of the combined adapter's file, in the shapes of the adapters' tensors."""
    tensors = {}
    for path, (A, B) in pairs.items():
        like = next(lora.pairs[path] for lora in loras if path in lora.pairs)
        kernel = (1,) * (like.B.dim() - 2)
        key = f"{PREFIX}{path}"
        tensors[f"{key}.lora_A.weight"] = A.reshape(A.shape[0], *like.A.shape[1:]).contiguous()
        tensors[f"{key}.lora_B.weight"] = B.reshape(*B.shape, *kernel).contiguous()
    return tensors


def _check_bases(adapters: Sequence[str]) -> None:
    """Raise BaseMismatch if the base models' fingerprints in the adapters' files disagree."""
    first, *others = [_fingerprint(adapter) for adapter in adapters]
    for adapter, other in zip(adapters[1:], others, strict=True):
        common = sorted(first.keys() & other.keys())
        a = _vector(first, common)
        b = _vector(other, common)
        if a.shape != b.shape or float((a - b).norm()) > 0.05 * max(float(a.norm()), 1e-12):
            raise BaseMismatch(f"{adapters[0]!r} and {adapter!r} were trained on different base models")


def _fingerprint(adapter: str) -> dict[str, Any]:
    """Values of the base model's weights by module path, from an adapter's file; empty if there are none."""
    _, provenance = checkpoint.read(adapter)
    fingerprint: dict[str, Any] = provenance.get("base", {})
    return fingerprint


def _vector(fingerprint: dict[str, Any], paths: Sequence[str]) -> Tensor:
    values: list[float] = []
    for path in paths:
        values.extend(fingerprint[path])
    return torch.tensor(values, dtype=torch.float64)


def _updates(loras: Sequence[Lora], weights: Sequence[float], path: str) -> Weighted:
    """(weight, update) of each adapter on a module."""
    updates = []
    for weight, lora in zip(weights, loras, strict=True):
        if path in lora.pairs:
            pair = lora.pairs[path]
            A = _widened(pair.A.flatten(1))
            B = _widened(pair.B.flatten(1))
            updates.append((weight, Update((A, B * pair.scale), None)))
    return updates


def _widened(t: Tensor) -> Tensor:
    """The tensor in at least fp32."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _sizes(path: str, updates: Weighted) -> tuple[int, int]:
    """(in_features, out_features) of a module."""
    pairs: list[Pair] = [update.pair for _, update in updates if update.pair is not None]
    sizes = {(A.shape[1], B.shape[0]) for A, B in pairs}
    if len(sizes) > 1:
        raise CheckpointError(f"{path!r} has different sizes in different adapters: {sorted(sizes)}")
    return sizes.pop()


# On the base model


def _on_base(
    adapters: Sequence[str], weights: Sequence[float], folder: Path, settings: Settings, model: str | None
) -> None:
    """Combine with `add_weighted_adapter`, on a base whose weights stay in their files."""
    opened = on_files(adapters, model)
    adapted = opened.model
    names = list(adapted.peft_config)
    base = adapted.peft_config[names[0]].base_model_name_or_path
    name = "default"
    try:
        add_weighted_adapter(
            adapted,
            names,
            weights,
            name,
            settings.method,
            settings.rank,
            settings.clamp,
            density=settings.density,
            majority_sign_method=settings.election,
        )
    except NotMergeable as error:
        listed = ", ".join(f"{n!r} is {adapter}" for n, adapter in zip(names, adapters, strict=True))
        raise NotMergeable(f"{error} ({listed})") from None
    adapted.peft_config[name].base_model_name_or_path = base or opened.base
    adapted.save_pretrained(folder, selected_adapters=[name])
