"""loralib's layout: a state dict of `lora_A` and `lora_B`, without a config.

    <path>.lora_A (r, in), <path>.lora_B (out, r)

It does not say alpha. The parts of a fused projection (`MergedLinear`) have pairs of their own, one after another in A
and B; which parts, it does not say either. What veneer writes says both in the metadata, which loralib ignores.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .lora import Hints, Lora, Pair, find, has_key, paired, read_tensors, write_tensors

name = "loralib"
WEIGHTS = "lora.safetensors"
FILES = (WEIGHTS, "lora*.safetensors", "*lora*.pt", "*lora*.bin", "*lora*.pth")


def is_here(directory: Path) -> bool:
    file = find(directory, *FILES)
    if file is None or (directory / "adapter_config.json").is_file():
        return False
    if file.suffix != ".safetensors":
        return True
    return has_key(file, ".lora_A")


def read(directory: Path, hints: Hints) -> Lora:
    file = find(directory, *FILES)
    assert file is not None
    tensors, metadata = read_tensors(file, hints.allow_pickle)
    alphas = _alphas(metadata)
    pairs = {}
    for path, (A, B) in paired(tensors, (".lora_A", ".lora_B"), file).items():
        alpha = hints.alpha if hints.alpha is not None else alphas.get(path)
        if alpha is None:
            raise ConfigError(f"{str(file)!r} does not say alpha, as loralib's files do not; give it with --alpha")
        pairs[path] = Pair(A, B, alpha) if A.shape[0] == B.shape[1] else _fused(path, A, B, alpha, hints.enabled)
    return Lora(pairs, hints.model)


def _alphas(metadata: dict[str, str]) -> dict[str, float]:
    try:
        found = json.loads(metadata.get("lora_alpha", "{}"))
    except (json.JSONDecodeError, RecursionError):
        return {}
    found = found if isinstance(found, dict) else {}
    return {k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _fused(path: str, A: Tensor, B: Tensor, alpha: float, enabled: list[bool] | None) -> Pair:
    """The pairs of a fused projection's parts as one pair: A one after another, B block-diagonal, zeros elsewhere."""
    r = B.shape[1]
    parts = A.shape[0] // r if r else 0
    if enabled is None:
        raise ConfigError(
            f"{path!r} is a fused projection with {parts} adapted parts; say which, as loralib was told: "
            "--enabled true,false,true"
        )
    if parts * r != A.shape[0] or sum(enabled) != parts or B.shape[0] % parts:
        raise CheckpointError(
            f"{path!r}: A {tuple(A.shape)} and B {tuple(B.shape)} are not {sum(enabled)} pairs of one rank"
        )
    width = B.shape[0] // parts
    whole = torch.zeros(width * len(enabled), parts * r, dtype=B.dtype)
    for k, place in enumerate(i for i, is_on in enumerate(enabled) if is_on):
        whole[place * width : (place + 1) * width, k * r : (k + 1) * r] = B[k * width : (k + 1) * width]
    return Pair(A, whole, alpha * parts)


def write(lora: Lora, directory: Path, hints: Hints) -> None:
    lora.matrices_only(name)
    ends = {"lora_A": "A", "lora_B": "B"}
    tensors = {f"{p}.{end}": getattr(pair, side) for p, pair in lora.pairs.items() for end, side in ends.items()}
    alphas = {path: pair.alpha for path, pair in lora.pairs.items()}
    write_tensors(directory / WEIGHTS, tensors, {"lora_alpha": json.dumps(alphas)})
