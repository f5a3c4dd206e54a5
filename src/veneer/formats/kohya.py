"""kohya's layout (sd-scripts): one safetensors file, with the dots of module paths written as underscores.

    lora_unet_<path>.lora_down.weight (r, in), .lora_up.weight (out, r), .alpha, one number

A path cannot be told from its underscores: the base model's skeleton gives them back, or metadata that veneer writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, listing
from .lora import Hints, Lora, Pair, find, has_key, paired, read_tensors, write_tensors

name = "kohya"
WEIGHTS = "lora.safetensors"
PREFIXES = ("lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lora_transformer")


def is_here(directory: Path) -> bool:
    file = find(directory, "*.safetensors")
    if file is None:
        return False
    return has_key(file, ".lora_down.weight")


def read(directory: Path, hints: Hints) -> Lora:
    file = find(directory, "*.safetensors")
    assert file is not None
    tensors, metadata = read_tensors(file, hints.allow_pickle)
    alphas = {key.removesuffix(".alpha"): t for key, t in tensors.items() if key.endswith(".alpha")}
    rest = {key: t for key, t in tensors.items() if not key.endswith(".alpha")}
    found = paired(rest, (".lora_down.weight", ".lora_up.weight"), file)
    own = _of_one_model(found, hints.prefix, file)
    paths = _paths(own, metadata, hints)
    pairs = {paths[key]: Pair(*found[key], _alpha(key, alphas, found[key][0])) for key in own}
    return Lora(pairs, hints.model)


def _of_one_model(keys: Iterable[str], prefix: str | None, file: Path) -> dict[str, str]:
    """The keys of one of the models in the file, each without its prefix."""
    known = sorted((prefix,) if prefix else PREFIXES, key=len, reverse=True)
    places = {key: next((p for p in known if key.startswith(f"{p}_")), None) for key in keys}
    found = sorted({p for p in places.values() if p is not None})
    if len(found) != 1:
        what = f"adapts several models ({', '.join(found)})" if found else f"has no key that begins with {known}"
        raise ConfigError(f"{str(file)!r} {what}; say which with --prefix")
    return {key: key.removeprefix(f"{p}_") for key, p in places.items() if p is not None}


def _paths(own: dict[str, str], metadata: dict[str, str], hints: Hints) -> dict[str, str]:
    if hints.model is not None:
        from ..files.skeleton import skeleton
        from ..targets.walk import walk

        known = [path for path, _ in walk(skeleton(hints.model))]
    else:
        known = _noted(metadata)
    by_name: dict[str, list[str]] = {}
    for path in known:
        by_name.setdefault(path.replace(".", "_"), []).append(path)
    lost = [key for key, flat in own.items() if len(by_name.get(flat, ())) != 1]
    if lost:
        raise ConfigError(
            "kohya's keys do not say the modules' paths, so the base model must be known (--model); these are of no "
            f"module, or of several:{listing(lost)}"
        )
    return {key: by_name[flat][0] for key, flat in own.items()}


def _noted(metadata: dict[str, str]) -> list[str]:
    try:
        found = json.loads(metadata.get("veneer_paths", "[]"))
    except (json.JSONDecodeError, RecursionError):
        return []
    return [path for path in found if isinstance(path, str)] if isinstance(found, list) else []


def _alpha(key: str, alphas: dict[str, Tensor], down: Tensor) -> float:
    """sd-scripts takes the rank where a file has no alpha."""
    alpha = alphas.get(key)
    if alpha is None:
        return float(down.shape[0])
    if alpha.numel() != 1 or not bool(torch.isfinite(alpha).all()):
        raise CheckpointError(f"{key}.alpha must be one number, not {tuple(alpha.shape)}")
    return float(alpha.reshape(()).item())


def write(lora: Lora, directory: Path, hints: Hints) -> None:
    prefix = hints.prefix or ("lora_te" if all(p.startswith("text_model.") for p in lora.pairs) else "lora_unet")
    tensors: dict[str, Tensor] = {}
    for path, pair in lora.pairs.items():
        key = f"{prefix}_{path.replace('.', '_')}"
        if f"{key}.alpha" in tensors:
            raise ConfigError(f"{path!r} and another module have one name in kohya's layout, {key!r}")
        alpha = torch.tensor(pair.alpha, dtype=torch.float64)
        narrow = alpha.float()
        tensors |= {f"{key}.lora_down.weight": pair.A, f"{key}.lora_up.weight": pair.B}
        tensors[f"{key}.alpha"] = narrow if narrow.double() == alpha else alpha
    write_tensors(directory / WEIGHTS, tensors, {"veneer_paths": json.dumps(list(lora.pairs))})
