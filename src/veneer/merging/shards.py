"""The safetensors files of a base model, used without reading them whole: mapped tensors in, tensors out one by one.

A tensor that comes from here is a view of a mapped file: it takes memory only where it is read, and gives it back when
it is dropped.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import CheckpointError, listing
from ..files.read import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""By the names that the format has for them."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Shards:
    """The tensor files of a model's directory, as transformers would read them.

    Raises:
        CheckpointError: there are none, one is damaged, or the index leads elsewhere.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = _files(directory)
        self.metadata: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        for file, wanted in self.files.items():
            self._read(file, wanted)

    def _read(self, file: str, wanted: list[str] | None) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.directory / file, framework="pt") as opened:
                self.metadata |= opened.metadata() or {}
                keys = list(opened.keys())
                lost = [key for key in wanted or () if key not in keys]
                if lost:
                    raise CheckpointError(f"the index of {str(self.directory)!r} says {file} holds:{listing(lost)}")
                for key in keys if wanted is None else wanted:
                    piece = opened.get_slice(key)
                    if piece.get_dtype() not in DTYPES:
                        raise CheckpointError(f"{file}: {key} is of type {piece.get_dtype()}, a quantised weight")
                    self.entries[key] = Entry(file, DTYPES[piece.get_dtype()], tuple(piece.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{str(self.directory / file)!r} is not a whole safetensors file: {error}") from None

    def tensors(self, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        """(key, mapped tensor); those of one call share a mapping for each file."""
        from safetensors import safe_open

        with ExitStack() as stack:
            opened: dict[str, Any] = {}
            for key in keys:
                file = self.entries[key].file
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(self.directory / file, framework="pt"))
                yield key, opened[file].get_tensor(key)

    def tensor(self, key: str) -> Tensor:
        """A mapped tensor, on a mapping of its own."""
        return next(self.tensors([key]))[1]


def _files(directory: Path) -> dict[str, list[str] | None]:
    """The keys wanted of each file; None: all of them."""
    if (directory / SINGLE).is_file():
        return {SINGLE: None}
    if not (directory / INDEX).is_file():
        raise CheckpointError(
            f"{str(directory)!r} holds neither {SINGLE} nor {INDEX}; save the base model there with save_pretrained()"
        )
    places = read_json(directory / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{str(directory / INDEX)!r} has no weight_map of keys to file names")
    found: dict[str, list[str] | None] = {}
    for key, file in places.items():
        if Path(file).name != file:
            raise CheckpointError(f"{str(directory / INDEX)!r} leads out of its directory: {file!r}")
        found.setdefault(file, []).append(key)  # type: ignore[union-attr]
    return found


class Writer:
    """Writes safetensors files whose tensors come one at a time, in any order.

    Args:
        directory: exists.
        entries: what will come, by key.
    """

    def __init__(self, directory: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
        self.entries, self.left = dict(entries), set(entries)
        self.opened: dict[str, IO[bytes]] = {}
        self.offsets: dict[str, int] = {}
        for file in dict.fromkeys(entry.file for entry in entries.values()):
            own = {key: entry for key, entry in entries.items() if entry.file == file}
            self.opened[file] = open(directory / file, "wb")  # noqa: SIM115 (closed on exit)
            start = self._head(file, own, metadata)
            self.opened[file].truncate(start + sum(entry.bytes for entry in own.values()))

    def _head(self, file: str, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> int:
        """Write the header; returns where the data starts."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        at = 0
        for key, entry in entries.items():
            span = [at, at + entry.bytes]
            header[key] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": span}
            self.offsets[key], at = at, span[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.opened[file].write(struct.pack("<Q", len(text)) + text)
        start = 8 + len(text)
        for key in entries:
            self.offsets[key] += start
        return start

    def put(self, key: str, tensor: Tensor) -> None:
        """Write one tensor, which has the dtype and shape that were announced."""
        entry = self.entries[key]
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), (key, tensor.shape, entry)
        file = self.opened[entry.file]
        file.seek(self.offsets[key])
        content: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        file.write(content)
        self.left.discard(key)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, *exc: Any) -> None:
        for file in self.opened.values():
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()
        assert kind is not None or not self.left, self.left


def numbered(n: int) -> list[str]:
    """File names of a model in n files."""
    return [SINGLE] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]


def index_of(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """What the index of a model in several files says."""
    total = sum(entry.bytes for entry in entries.values())
    numbers = sum(math.prod(entry.shape) for entry in entries.values())
    places = {key: entry.file for key, entry in sorted(entries.items())}
    return {"metadata": {"total_parameters": numbers, "total_size": total}, "weight_map": places}
