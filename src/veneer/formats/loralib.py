"""loralib's layout: a state dict of `lora_A` and `lora_B`, without a config.

    <path>.lora_A (r, in), <path>.lora_B (out, r)

It does not record alpha. The adapted parts of a fused projection (`MergedLinear`) have a pair each, concatenated in A
and B, and it does not record which parts they are. veneer writes alpha to the metadata, which loralib ignores.
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
        alpha = alphas.get(path) if hints.alpha is None else hints.alpha
        if alpha is None:
            raise ConfigError(f"{str(file)!r} does not record alpha, as loralib's files do not; give --alpha")
        is_fused = A.shape[0] != B.shape[1]
        pairs[path] = _fused(path, A, B, alpha, hints.enabled) if is_fused else Pair(A, B, alpha)
    return Lora(pairs, hints.model)


def _alphas(metadata: dict[str, str]) -> dict[str, float]:
    """alpha by the modules' paths, from the metadata that veneer writes; empty if it has none."""
    try:
        content = json.loads(metadata.get("lora_alpha", "{}"))
    except (json.JSONDecodeError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    alphas = {}
    for path, alpha in content.items():
        if isinstance(alpha, (int, float)) and not isinstance(alpha, bool):
            alphas[path] = alpha
    return alphas


def _fused(path: str, A: Tensor, B: Tensor, alpha: float, enabled: list[bool] | None) -> Pair:
    """One pair for the parts of a fused projection: A stays concatenated, B becomes block-diagonal."""
    r = B.shape[1]
    parts = A.shape[0] // r if r else 0
    if enabled is None:
        raise ConfigError(
            f"{path!r} is a fused projection with {parts} adapted parts; give loralib's enable_lora: "
            "--enabled true,false,true"
        )
    if parts * r != A.shape[0] or sum(enabled) != parts or B.shape[0] % parts:
        raise CheckpointError(
            f"{path!r}: A {tuple(A.shape)} and B {tuple(B.shape)} are not {sum(enabled)} pairs of one rank (--enabled)"
        )
    width = B.shape[0] // parts
    blocks = torch.zeros(len(enabled), width, parts, r, dtype=B.dtype)
    is_on = torch.tensor(enabled).nonzero().flatten().tolist()
    for k, part in enumerate(is_on):
        blocks[part, :, k] = B[k * width : (k + 1) * width]
    return Pair(A, blocks.reshape(-1, parts * r), alpha * parts)


def write(lora: Lora, directory: Path, hints: Hints) -> None:
    lora.matrices_only(name)
    alphas = {path: pair.alpha for path, pair in lora.pairs.items()}
    metadata = {"lora_alpha": json.dumps(alphas)}
    write_tensors(directory / WEIGHTS, lora.tensors(".lora_A", ".lora_B"), metadata)
