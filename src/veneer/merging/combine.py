"""Weighted sums of adapters on disk. LoRAs are summed from their files alone; other methods stand on their base."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import checkpoint
from ..core.config import Config
from ..errors import BaseMismatch, CheckpointError, ConfigError, NotMergeable
from ..files.write import appearing, check_free
from ..formats import peft
from ..formats.lora import Hints, Lora
from ..maths.low_rank import Pair
from ..model.combine import Weighted, add_weighted_adapter, check_weights, clamped, rule
from ..model.to_lora import Update, lora_config
from .merge import base_of, on_files


@dataclass(frozen=True)
class Combination:
    out: str
    adapters: list[str]
    weights: list[float]
    method: str
    with_base: bool
    """The base model had to be read."""
    modules: int
    rank: int
    """The highest."""

    def as_dict(self) -> dict[str, Any]:
        return vars(self)


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
        model: the base, where an adapter is no LoRA; None: the one that the adapters name.
        seed: of what DARE drops.

    Raises:
        VeneerError: an argument is out of range, or an adapter is no update of the weights; nothing is written.
    """
    check_free(Path(out))
    check_weights(adapters, weights, rank)
    rule(method, density, election)
    configs = [Config.from_pretrained(adapter) for adapter in adapters]
    is_plain = all(_is_plain(config) for config in configs)
    with appearing(Path(out)) as folder, torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        if is_plain:
            _from_files(adapters, weights, folder, (method, rank, density, election, clamp), model)
        else:
            _on_base(adapters, weights, folder, (method, rank, density, election, clamp), model)
        done = peft.read(folder, Hints()).check(folder)
    ranks = [pair.r for pair in done.pairs.values()]
    return Combination(str(out), [*adapters], [*weights], method, not is_plain, len(ranks), max(ranks))


def _is_plain(config: Config) -> bool:
    try:
        peft.check_plain(config)
    except ConfigError:
        return False
    return True


Settings = tuple[str, int | None, float | None, str, float | None]


def _from_files(
    adapters: Sequence[str], weights: Sequence[float], folder: Path, settings: Settings, model: str | None
) -> None:
    method, rank, density, election, clamp = settings
    loras = [peft.read(Path(adapter), Hints()).check(Path(adapter)) for adapter in adapters]
    configs = [Config.from_pretrained(adapter) for adapter in adapters]
    _check_bases(adapters, configs)
    how = rule(method, density, election)
    rank = rank or max(pair.r for lora in loras for pair in lora.pairs.values())
    pairs = {}
    for path in dict.fromkeys(path for lora in loras for path in lora.pairs):
        updates = _updates(loras, weights, path)
        sizes = _sizes(path, updates)
        pairs[path] = clamped(how(updates, min(rank, *sizes), path), clamp)
    config = lora_config(configs[0], pairs)
    config.base_model_name_or_path = base_of(configs, model) if model else configs[0].base_model_name_or_path
    config.inference_mode = True
    shapes = {path: next(lora.pairs[path] for lora in loras if path in lora.pairs) for path in pairs}
    tensors = {
        f"{peft.PREFIX}{path}.lora_{side}.weight": t.reshape(t.shape[0], *like.shape[1:])
        if side == "A"
        else t.reshape(*t.shape, *(1,) * (like.dim() - 2))
        for path, pair in pairs.items()
        for side, t, like in zip("AB", pair, (shapes[path].A, shapes[path].B), strict=True)
    }
    notes = checkpoint.read(adapters[0])[1]
    checkpoint.write(folder, {key: t.contiguous() for key, t in tensors.items()}, notes, config)


def _check_bases(adapters: Sequence[str], configs: Sequence[Config]) -> None:
    """Raise where the files' notes on their base models disagree: sums are of adapters of one base."""
    noted = [checkpoint.read(adapter)[1].get("base", {}) for adapter in adapters]
    for adapter, mine in zip(adapters[1:], noted[1:], strict=True):
        common = {path for path in mine if path in noted[0]}
        a, b = (
            torch.tensor([v for path in sorted(common) for v in notes[path]], dtype=torch.float64)
            for notes in (noted[0], mine)
        )
        if a.shape != b.shape or float((a - b).norm()) > 0.05 * max(float(a.norm()), 1e-12):
            raise BaseMismatch(f"{adapters[0]!r} and {adapter!r} were trained on different base models")


def _updates(loras: Sequence[Lora], weights: Sequence[float], path: str) -> Weighted:
    found = []
    for weight, lora in zip(weights, loras, strict=True):
        if path in lora.pairs:
            pair = lora.pairs[path]
            A, B = (_wide(t.flatten(1)) for t in (pair.A, pair.B))
            found.append((weight, Update((A, B * pair.scale), None)))
    return found


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _sizes(path: str, updates: Weighted) -> tuple[int, int]:
    pairs: list[Pair] = [update.pair for _, update in updates if update.pair is not None]
    sizes = {(A.shape[1], B.shape[0]) for A, B in pairs}
    if len(sizes) > 1:
        raise CheckpointError(f"{path!r} has other sizes in one adapter than in another: {sorted(sizes)}")
    return sizes.pop()


def _on_base(
    adapters: Sequence[str], weights: Sequence[float], folder: Path, settings: Settings, model: str | None
) -> None:
    """As `add_weighted_adapter` does it, on a base whose weights stay in their files."""
    method, rank, density, election, clamp = settings
    base, _, _, adapted = on_files(adapters, model)
    names = list(adapted.peft_config)
    name, also = "default", copy.copy(adapted.peft_config[names[0]])
    try:
        add_weighted_adapter(
            adapted, names, weights, name, method, rank, clamp, density=density, majority_sign_method=election
        )
    except NotMergeable as error:
        listed = ", ".join(f"{n!r} is {adapter}" for n, adapter in zip(names, adapters, strict=True))
        raise NotMergeable(f"{error} ({listed})") from None
    adapted.peft_config[name].base_model_name_or_path = also.base_model_name_or_path or base
    adapted.save_pretrained(folder, selected_adapters=[name])
