"""Files: found in a directory or on the hub, read as JSON, written so that a crash loses nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, first_line

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
MOST_CONFIG_BYTES = 10_000_000
MOST_HEADER_BYTES = 16_000_000
"""Of a safetensors file: room for a hundred thousand tensors."""


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors by key, from its header alone.

    Raises:
        CheckpointError: it is none, or not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except CheckpointError:
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is not a whole safetensors file: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it is none, is too large for a config, or says something twice or with a number that is none.
    """
    if not path.is_file():  # a device would never end
        raise CheckpointError(f"{str(path)!r} is no file")
    size = path.stat().st_size
    if size > MOST_CONFIG_BYTES:
        raise CheckpointError(f"{str(path)!r} has {size:,} bytes, which no config has")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_once, parse_constant=_number, parse_float=_number)
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is not JSON that can be trusted: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(content).__name__}, not an object of config fields")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return content


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:30]} is no number")
    return number


def check_header(path: Path) -> None:
    """Raise CheckpointError where a safetensors file states a header that it does not hold, or that nobody would write.

    Before anything is read: the header is parsed in memory, and takes several times its size there.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        stated = int.from_bytes(file.read(8), "little")
    if size < 8 or stated > size - 8 or stated > MOST_HEADER_BYTES:
        raise CheckpointError(
            f"{str(path)!r} is not a whole safetensors file: it has {size:,} bytes and states a header of {stated:,}"
        )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by key, metadata) of a safetensors file.

    Raises:
        CheckpointError: it is none, or not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            # cloned into memory of torch's own alignment: in the file's, products can differ in the last bits
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, file.metadata() or {}
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, MemoryError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{str(path)!r} is not a whole safetensors file: {error}") from None


def computable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floats of 8 bits, for which torch has no arithmetic, as 32; and all as 64 where some are, which it does not mix.

    Nothing is rounded. A lone number (kohya's alpha) goes with floats of any width.
    """
    import torch

    floats = {key: t for key, t in tensors.items() if t.is_floating_point()}
    widest = max((t.element_size() for t in floats.values() if t.dim()), default=0)
    narrow = {key: t for key, t in floats.items() if t.element_size() == 1 or t.element_size() < widest == 8}
    return tensors | {key: t.to(torch.float64 if widest == 8 else torch.float32) for key, t in narrow.items()}


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors by key of a pickled file, by torch's reader that builds tensors and nothing else.

    Raises:
        CheckpointError: it holds anything but tensors by name.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can fail anywhere in the reader
        reason = first_line(error)
        raise CheckpointError(f"{str(path)!r} is no pickle of tensors alone: {reason}") from None
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(t, torch.Tensor) and t.layout == torch.strided for key, t in content.items()
    ):
        raise CheckpointError(f"{str(path)!r} holds other things than tensors by name")
    return {key: t.detach().clone().contiguous() for key, t in content.items()}
