"""What a weight file records about its origin: a sample of the base model's weights, checksums, and the settings.

It is stored in the safetensors metadata under "veneer", which other readers ignore. Files without it can be loaded too.
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
KINDS: dict[str, type] = {
    "base": dict,
    "checksums": list,
    "settings": dict,
    "file": dict,
    "preparation": dict,
    "training": list,
}
"""The entries and their types."""
PREPARATION = "_veneer_preparation"
"""The attribute of a base model that says what was done to its weights after they were read (see `prepare`)."""
MERGED = "merged"
"""The entry of the preparation that lists digests of the adapters merged in, innermost first."""
SAMPLED = 16
"""The maximum number of layers that are sampled."""
NEAR, NEAR_QUANTISED = 0.05, 0.3
"""The largest accepted distance between the sampled and the recorded weights, relative to their norm."""


def metadata(notes: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Config) -> dict[str, str]:
    """The metadata of a weight file: the notes, with checksums and settings added."""
    content = {name: value for name, value in notes.items() if name != "damaged"}
    content["checksums"] = checksums(tensors)
    content["settings"] = settings(config)
    return {"format": "pt", KEY: json.dumps(content)}


def read(metadata: Mapping[str, str], tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """The notes in a file's metadata; empty if they are missing or malformed.

    With the file's tensors, the entry "damaged" lists the keys of those that have changed since they were written.
    """
    try:
        notes = json.loads(metadata.get(KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(notes, dict):
        return {}
    for name, kind in KINDS.items():
        if not isinstance(notes.get(name, kind()), kind):
            return {}
    if tensors is None:
        return notes
    return notes | {"damaged": _damaged(tensors, notes.get("checksums"))}


# Checksums


def checksums(tensors: Mapping[str, Tensor]) -> list[int]:
    """CRC-32 of each tensor with its key, dtype and shape, in the order of the keys."""
    return [_checksum(key, tensors[key]) for key in sorted(tensors)]


def _checksum(key: str, tensor: Tensor) -> int:
    header = f"{key} {tensor.dtype} {tuple(tensor.shape)}"
    start = zlib.crc32(header.encode("utf-8", "surrogatepass"))
    content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(content, start)


def _damaged(tensors: Mapping[str, Tensor], noted: list[int] | None) -> list[str]:
    """The keys of tensors whose checksums differ from the recorded ones."""
    if noted is None:
        return []
    if len(noted) != len(tensors):
        return [f"{len(tensors)} tensors instead of the {len(noted)} that were written"]
    damaged = []
    for key, actual, expected in zip(sorted(tensors), checksums(tensors), noted, strict=True):
        if actual != expected:
            damaged.append(key)
    return damaged


def check_undamaged(notes: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a file's tensors have changed since they were written."""
    if notes.get("damaged"):
        raise CheckpointError(
            "the file was damaged or changed after it was written: its checksums differ for"
            f"{listing(notes['damaged'])}\nDownload it again; if you changed the tensors yourself, save them without "
            f'the metadata entry "{KEY}"'
        )


# Settings


def settings(config: Config) -> dict[str, Any]:
    """The fields of a config that decide what its tensors mean, in the form in which files hold them."""
    content = config.to_dict()
    values = {}
    for name in config.semantic_fields():
        values[name] = content[name] if name in content else getattr(config, name)
    plain = json.loads(json.dumps(values))
    return without_paths(plain, names_of_paths(config))


def differences(config: Config, notes: Mapping[str, Any]) -> list[str]:
    """The settings of a config that differ from the recorded ones, one line each."""
    current = settings(config)
    lines = []
    for name, noted in notes.get("settings", {}).items():
        if name in current and current[name] != noted:
            lines.append(f"{name} = {current[name]!r}, but {noted!r} when the tensors were written")
    return lines


# The base model


def prepare(model: Any, **steps: Any) -> None:
    """Note what was done to a base model's weights since they were read, for the files of adapters trained on it."""
    model.__dict__[PREPARATION] = preparation(model) | steps


def preparation(model: Any) -> dict[str, Any]:
    """What was done to a base model's weights, by name; empty for one that is as it was read."""
    return dict(model.__dict__.get(PREPARATION, {}))


def check_prepared(model: Any, notes: Mapping[str, Any]) -> None:
    """Raise BaseMismatch unless the same adapters were merged into this model as for the adapter's training."""
    if not notes.get("base"):
        return
    wanted = notes.get("preparation", {}).get(MERGED, [])
    here = preparation(model).get(MERGED, [])
    if wanted and not here:
        raise BaseMismatch(
            "the adapter was trained on its base model with an earlier adapter merged in, which is in its folder "
            "'start'. Load both with AutoPeftModelForCausalLM.from_pretrained(...), or merge both with `veneer merge`"
        )
    if wanted != here:
        raise BaseMismatch(
            "the adapter was trained on its base model without the adapters that are merged into this one"
        )


def fingerprint(weights: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """A few of the pretrained weights, by which the base model is recognised."""
    step = max(1, len(weights) // SAMPLED)
    paths = list(weights)[::step][:SAMPLED]
    return {path: _sample(weights[path]) for path in paths}


def check_base(weights: Mapping[str, Tensor], notes: Mapping[str, Any], rounded: bool = False) -> None:
    """Raise BaseMismatch if the recorded weights are not those of this model.

    Args:
        rounded: whether this model's weights are quantised.
    """
    noted = {path: sample for path, sample in notes.get("base", {}).items() if path in weights and _is_sample(sample)}
    if not noted:
        return
    samples: list[float] = []
    noted_samples: list[float] = []
    for path, sample in noted.items():
        samples += _sample(weights[path])
        noted_samples += sample
    here = torch.tensor(samples)
    there = torch.tensor(noted_samples)
    if here.shape != there.shape:
        raise BaseMismatch(
            "the adapter was trained on another base model: the recorded weights do not fit this model's layers. Load "
            "the base model it was trained on, or pass check_base=False"
        )
    distance = float((here - there).norm() / there.norm().clamp_min(1e-12))
    limit = NEAR_QUANTISED if rounded or notes.get("rounded") else NEAR
    if not distance <= limit:  # also where it is nan
        raise BaseMismatch(
            f"the adapter was trained on another base model: samples from {len(noted)} layers differ by {distance:.0%} "
            "from this model's weights. Load the base model it was trained on, or pass check_base=False"
        )


def _is_sample(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(number, float) for number in value)


def _sample(W: Tensor) -> list[float]:
    """Four values spread over a weight, rounded to bfloat16."""
    places = tuple(torch.linspace(0, size - 1, 4, device=W.device).long() for size in W.shape)
    return W.detach()[places].to(torch.bfloat16).tolist()
