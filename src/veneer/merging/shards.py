"""The safetensors files of a base model, read by memory mapping and written one tensor at a time.

A tensor read here is a view of a memory-mapped file: it uses memory only for the parts that are read, and releases it
when it is deleted.
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

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
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
"""torch dtypes by their names in the safetensors format."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is stored, its dtype and its shape."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Shards:
    """The tensor files in a model's directory that transformers would read.

    Raises:
        CheckpointError: there are none, one is damaged, or the index names a file outside of the directory.
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

        path = self.directory / file
        try:
            with safe_open(path, framework="pt") as opened:
                self.metadata |= opened.metadata() or {}
                keys = list(opened.keys())
                if wanted is not None:
                    self._check_keys(file, wanted, keys)
                    keys = wanted
                for key in keys:
                    self.entries[key] = _entry(file, key, opened.get_slice(key))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{str(path)!r} is not a whole safetensors file: {error}") from None

    def _check_keys(self, file: str, wanted: list[str], keys: list[str]) -> None:
        missing = [key for key in wanted if key not in keys]
        if missing:
            raise CheckpointError(
                f"{file} lacks tensors that the index of {str(self.directory)!r} places in it:{listing(missing)}"
            )

    def tensors(self, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, mapped tensor); the tensors of one call share one mapping of each file."""
        from safetensors import safe_open

        with ExitStack() as stack:
            opened: dict[str, Any] = {}
            for key in keys:
                file = self.entries[key].file
                if file not in opened:
                    mapping = safe_open(self.directory / file, framework="pt")
                    opened[file] = stack.enter_context(mapping)
                yield key, opened[file].get_tensor(key)

    def tensor(self, key: str) -> Tensor:
        """A tensor with a separate mapping of its file."""
        _, tensor = next(self.tensors([key]))
        return tensor


def _entry(file: str, key: str, piece: Any) -> Entry:
    """The entry of a safetensors slice."""
    dtype = piece.get_dtype()
    if dtype not in DTYPES:
        raise CheckpointError(f"{file}: {key} has dtype {dtype}, so it is quantised; give the original model")
    return Entry(file, DTYPES[dtype], tuple(piece.get_shape()))


def _files(directory: Path) -> dict[str, list[str] | None]:
    """The keys to read from each file; None: all of its keys."""
    if (directory / SINGLE).is_file():
        return {SINGLE: None}
    if not (directory / INDEX).is_file():
        raise CheckpointError(
            f"{str(directory)!r} holds neither {SINGLE} nor {INDEX}; save the base model there with save_pretrained()"
        )
    places = read_json(directory / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{str(directory / INDEX)!r} has no weight_map of keys to file names")
    keys: dict[str, list[str] | None] = {}
    for key, file in places.items():
        if Path(file).name != file:
            raise CheckpointError(f"{str(directory / INDEX)!r} names a file outside of its directory: {file!r}")
        keys.setdefault(file, []).append(key)  # type: ignore[union-attr]
    return keys


class Writer:
    """Writes safetensors files, one tensor at a time and in any order.

    Args:
        directory: an existing directory.
        entries: the tensors that will be written, by key.
        metadata: metadata of each file.

    Attributes:
        left: keys of the tensors that are not written yet.
    """

    def __init__(self, directory: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
        self.entries = dict(entries)
        self.left = set(entries)
        self.opened: dict[str, IO[bytes]] = {}
        self.offsets: dict[str, int] = {}
        by_file: dict[str, dict[str, Entry]] = {}
        for key, entry in entries.items():
            by_file.setdefault(entry.file, {})[key] = entry
        for file, own in by_file.items():
            self.opened[file] = open(directory / file, "wb")  # noqa: SIM115 (closed on exit)
            end = self._write_header(file, own, metadata)
            self.opened[file].truncate(end)

    def _write_header(self, file: str, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> int:
        """Write a file's header and note the offsets of its tensors; returns the size of the whole file."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        starts: dict[str, int] = {}
        size = 0
        for key, entry in entries.items():
            starts[key] = size
            size += entry.bytes
            header[key] = {
                "dtype": NAMES[entry.dtype],
                "shape": entry.shape,
                "data_offsets": [starts[key], size],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data is aligned to 8 bytes
        length = struct.pack("<Q", len(text))
        self.opened[file].write(length + text)
        data_start = len(length) + len(text)
        for key, start in starts.items():
            self.offsets[key] = data_start + start
        return data_start + size

    def put(self, key: str, tensor: Tensor) -> None:
        """Write one tensor, of the dtype and shape in its entry."""
        entry = self.entries[key]
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), (key, tensor.shape, entry)
        file = self.opened[entry.file]
        file.seek(self.offsets[key])
        flat = tensor.detach().contiguous().reshape(-1)
        content: Any = flat.view(torch.uint8).numpy()
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
    if n == 1:
        return [SINGLE]
    return [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]


def index_of(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The content of the index of a model in several files."""
    size = 0
    parameters = 0
    places = {}
    for key, entry in sorted(entries.items()):
        size += entry.bytes
        parameters += math.prod(entry.shape)
        places[key] = entry.file
    return {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": places}
