"""Reading a GGUF file with gguf-py: its metadata, and one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, first_line, printable

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

MAGIC = b"GGUF"
EXACT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The torch dtypes of the types that are not quantised."""


class Source:
    """A GGUF file of a model.

    Args:
        path: the file.

    Attributes:
        shown: the path, for messages.
        metadata: the values by key, without the entries that describe the file itself.

    Raises:
        ConfigError: the file is not a GGUF file, or holds no whole model.
        CheckpointError: it is damaged or truncated.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        self.shown = repr(str(path))
        _check_beginning(path)
        try:
            reader = GGUFReader(path)
            self.metadata: dict[str, Any] = {
                key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
            }
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise CheckpointError(
                f"{self.shown} is damaged or truncated: {printable(first_line(error))} ({path.stat().st_size:,} "
                "bytes); download or copy it again"
            ) from None
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._check_kind()

    def _check_kind(self) -> None:
        """Raise ConfigError unless the file holds a whole model."""
        kind = self.metadata.get("general.type", "model")
        if kind == "adapter":
            raise ConfigError(
                f"{self.shown} is an adapter, not a model; give the GGUF file of its base model, and the adapter "
                "in the form that it was trained in"
            )
        if kind != "model":
            raise ConfigError(f"{self.shown} holds a GGUF of type {kind!r}, not a model")
        parts = self.metadata.get("split.count", 1)
        if parts > 1:
            number = self.metadata.get("split.no", 0) + 1
            raise ConfigError(
                f"{self.shown} is part {number} of {parts}; join the parts with `llama-gguf-split --merge`"
            )
        if not isinstance(self.metadata.get("general.architecture"), str):
            raise CheckpointError(f"{self.shown} names no architecture (general.architecture)")

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.metadata["general.architecture"])

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, in torch's order."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def type(self, name: str) -> GGMLQuantizationType:
        return self._tensors[name].tensor_type

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that holds a tensor exactly: its own, or fp32 for one that is quantised."""
        return EXACT.get(self.type(name).name, torch.float32)

    def value(self, name: str) -> Tensor:
        """A tensor in its exact dtype; a quantised one is dequantised."""
        from gguf import dequantize

        stored = self._tensors[name]
        try:
            plain = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError:
            raise ConfigError(
                f"{self.shown} stores {printable(name)} as {stored.tensor_type.name}, which gguf-py cannot read"
            ) from None
        return torch.tensor(plain).reshape(self.shape(name)).to(self.dtype(name))


def _check_beginning(path: Path) -> None:
    try:
        with path.open("rb") as file:
            beginning = file.read(len(MAGIC))
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error.strerror or first_line(error)}") from None
    if not beginning:
        raise ConfigError(f"{str(path)!r} is empty")
    if beginning != MAGIC:
        raise ConfigError(f"{str(path)!r} is not a GGUF file: it does not begin with {MAGIC.decode()!r}")


class Settings:
    """The metadata of one architecture, which notes what has been read.

    Args:
        metadata: the metadata of a file.
        architecture: llama.cpp's name of the architecture, with which its keys begin.
    """

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        prefix = f"{architecture}."
        self._values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        self._unread = set(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def read(self, key: str, default: Any = None) -> Any:
        """A value, which counts as read from now on."""
        self._unread.discard(key)
        return self._values.get(key, default)

    def unread(self) -> Iterator[tuple[str, Any]]:
        """(key, value) of what has not been read."""
        for key in sorted(self._unread):
            yield key, self._values[key]
