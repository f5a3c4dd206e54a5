"""kohya's layout (sd-scripts): one safetensors file, with underscores instead of dots in the modules' paths.

    lora_unet_<path>.lora_down.weight (r, in), .lora_up.weight (out, r), .alpha (one number)

A path cannot be recovered from the key alone. It is looked up among the modules of the base model, or in the metadata
that veneer writes.
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
    alphas = {}
    factors = {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = tensor
        else:
            factors[key] = tensor
    by_key = paired(factors, (".lora_down.weight", ".lora_up.weight"), file)
    names = _of_one_model(by_key, hints.prefix, file)
    paths = _paths(names, metadata, hints)
    pairs = {}
    for key, path in paths.items():
        A, B = by_key[key]
        pairs[path] = Pair(A, B, _alpha(key, alphas, A))
    return Lora(pairs, hints.model)


def _of_one_model(keys: Iterable[str], prefix: str | None, file: Path) -> dict[str, str]:
    """The keys without their prefix, by key; raises ConfigError unless they belong to exactly one model."""
    known = sorted((prefix,) if prefix else PREFIXES, key=len, reverse=True)
    names = {}
    prefixes = set()
    for key in keys:
        for candidate in known:
            if key.startswith(f"{candidate}_"):
                names[key] = key.removeprefix(f"{candidate}_")
                prefixes.add(candidate)
                break
    if not prefixes:
        raise ConfigError(f"{str(file)!r} has no key that begins with {known}; give --prefix")
    if len(prefixes) > 1:
        models = ", ".join(sorted(prefixes))
        raise ConfigError(f"{str(file)!r} adapts several models ({models}); choose one with --prefix")
    return names


def _paths(names: dict[str, str], metadata: dict[str, str], hints: Hints) -> dict[str, str]:
    """The modules' paths by key, for names with underscores by key."""
    by_name: dict[str, list[str]] = {}
    for path in _known_paths(metadata, hints):
        by_name.setdefault(path.replace(".", "_"), []).append(path)
    paths = {}
    ambiguous = []
    for key, name in names.items():
        candidates = by_name.get(name, [])
        if len(candidates) == 1:
            paths[key] = candidates[0]
        else:
            ambiguous.append(key)
    if ambiguous:
        raise ConfigError(
            "kohya's keys do not contain the modules' paths; give the base model with --model. These keys match no "
            f"module, or several:{listing(ambiguous)}"
        )
    return paths


def _known_paths(metadata: dict[str, str], hints: Hints) -> list[str]:
    """Paths of the base model's modules or, if it is unknown, those in the metadata."""
    if hints.model is None:
        return _recorded_paths(metadata)
    from ..files.skeleton import skeleton
    from ..targets.walk import walk

    return [path for path, _ in walk(skeleton(hints.model))]


def _recorded_paths(metadata: dict[str, str]) -> list[str]:
    try:
        content = json.loads(metadata.get("veneer_paths", "[]"))
    except (json.JSONDecodeError, RecursionError):
        return []
    if not isinstance(content, list):
        return []
    return [path for path in content if isinstance(path, str)]


def _alpha(key: str, alphas: dict[str, Tensor], down: Tensor) -> float:
    """alpha of a module; like sd-scripts, the rank if the file has none."""
    alpha = alphas.get(key)
    if alpha is None:
        return float(down.shape[0])
    if alpha.numel() != 1 or not bool(torch.isfinite(alpha).all()):
        raise CheckpointError(f"{key}.alpha must be one number, not {tuple(alpha.shape)}")
    return float(alpha.reshape(()).item())


def write(lora: Lora, directory: Path, hints: Hints) -> None:
    prefix = hints.prefix or _default_prefix(lora)
    tensors: dict[str, Tensor] = {}
    for path, pair in lora.pairs.items():
        key = f"{prefix}_{path.replace('.', '_')}"
        if f"{key}.alpha" in tensors:
            raise ConfigError(f"{path!r} and another module have the same key in kohya's layout, {key!r}")
        tensors[f"{key}.lora_down.weight"] = pair.A
        tensors[f"{key}.lora_up.weight"] = pair.B
        tensors[f"{key}.alpha"] = _alpha_tensor(pair.alpha)
    metadata = {"veneer_paths": json.dumps(list(lora.pairs))}
    write_tensors(directory / WEIGHTS, tensors, metadata)


def _default_prefix(lora: Lora) -> str:
    is_text_encoder = all(path.startswith("text_model.") for path in lora.pairs)
    return "lora_te" if is_text_encoder else "lora_unet"


def _alpha_tensor(alpha: float) -> Tensor:
    """alpha in fp32, or in fp64 if fp32 would change it."""
    exact = torch.tensor(alpha, dtype=torch.float64)
    narrow = exact.float()
    return narrow if narrow.double() == exact else exact
