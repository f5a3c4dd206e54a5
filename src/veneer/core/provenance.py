"""What a weight file says of its origin, beside its tensors: a sample of the base model, checksums, the settings.

They stand in the safetensors metadata under "veneer", which other readers ignore. A file without them loads too.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BaseMismatch, CheckpointError, listing
from ..files.confine import names_of_paths, without_paths

if TYPE_CHECKING:
    from .config import Config

KEY = "veneer"


def metadata(notes: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Config) -> dict[str, str]:
    """The metadata of a weight file: notes on the base, completed by checksums and settings."""
    kept = {name: value for name, value in notes.items() if name != "damaged"}
    own = kept | {"checksums": checksums(tensors), "settings": settings(config)}
    return {"format": "pt", KEY: json.dumps(own)}


def read(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A file's notes; under "damaged" the keys of tensors that are not what was written. Nonsense counts as none."""
    try:
        notes = json.loads(metadata.get(KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    kinds = {"base": dict, "checksums": list, "settings": dict}
    if not isinstance(notes, dict) or any(
        not isinstance(notes.get(name, kind()), kind) for name, kind in kinds.items()
    ):
        return {}
    return notes | {"damaged": _damaged(tensors, notes.get("checksums"))}


# Checksums


def checksums(tensors: Mapping[str, Tensor]) -> list[int]:
    """CRC-32 of each tensor with its key, dtype and shape, in the order of the keys."""
    return [_checksum(key, tensors[key]) for key in sorted(tensors)]


def _checksum(key: str, t: Tensor) -> int:
    start = zlib.crc32(f"{key} {t.dtype} {tuple(t.shape)}".encode("utf-8", "surrogatepass"))
    content: Any = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(content, start)


def _damaged(tensors: Mapping[str, Tensor], noted: list[int] | None) -> list[str]:
    if noted is None:
        return []
    if len(noted) != len(tensors):
        return [f"{len(tensors)} tensors, of {len(noted)} that were written"]
    return [key for key, own, sum in zip(sorted(tensors), checksums(tensors), noted, strict=True) if own != sum]


def check_whole(notes: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a file's tensors are not those that were written."""
    if notes.get("damaged"):
        raise CheckpointError(
            "the file was damaged or changed after it was written: its checksums differ for"
            f"{listing(notes['damaged'])}\nGet it anew; to load tensors that you changed yourself, save them without "
            f'the metadata entry "{KEY}"'
        )


# Settings


def settings(config: Config) -> dict[str, Any]:
    """The fields of a config that say what its tensors mean, as they stand in a file."""
    content = config.to_dict()
    own = {name: content[name] if name in content else getattr(config, name) for name in config.semantic_fields()}
    return without_paths(json.loads(json.dumps(own)), names_of_paths(config))


def unlike(config: Config, notes: Mapping[str, Any]) -> list[str]:
    """Where a config's settings are not those that the tensors were written with."""
    noted, here = notes.get("settings", {}), settings(config)
    return [f"{k} = {here[k]!r}, when written {v!r}" for k, v in noted.items() if k in here and here[k] != v]


# The base model


def fingerprint(weights: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """A few of the pretrained weights, to recognise the base model by."""
    return {path: _sample(weights[path]) for path in list(weights)[:: max(1, len(weights) // 16)][:16]}


def check_base(weights: Mapping[str, Tensor], notes: Mapping[str, Any], rounded: bool = False) -> None:
    """Raise BaseMismatch when the noted weights are not those of this model, which may be quantised (`rounded`)."""
    noted = {
        path: values
        for path, values in notes.get("base", {}).items()
        if path in weights and isinstance(values, list) and all(isinstance(v, float) for v in values)
    }
    if not noted:
        return
    here = torch.tensor([v for path in noted for v in _sample(weights[path])])
    there = torch.tensor([v for values in noted.values() for v in values])
    if here.shape != there.shape:
        raise BaseMismatch("the file's notes on its base model do not fit this model's layers")
    difference = float((here - there).norm() / there.norm().clamp_min(1e-12))
    if not difference <= (0.3 if rounded or notes.get("rounded") else 0.05):
        raise BaseMismatch(
            f"the adapter was trained on another base model: {len(noted)} of its layers, sampled, differ by "
            f"{difference:.0%} from the weights here. Load the base it was trained on, or pass check_base=False"
        )


def _sample(W: Tensor) -> list[float]:
    """Four values spread over a weight, rounded as bf16 would."""
    where = [torch.linspace(0, size - 1, 4, device=W.device).long() for size in W.shape]
    return W.detach()[tuple(where)].to(torch.bfloat16).tolist()
