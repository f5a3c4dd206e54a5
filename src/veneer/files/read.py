"""Reading JSON, safetensors and pickle files with limits, because their content cannot be trusted."""

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
PREFIX = "base_model.model."
"""How the keys of adapted modules begin in an adapter's file."""
MOST_CONFIG_BYTES = 10_000_000
MOST_HEADER_BYTES = 16_000_000
"""The largest safetensors header that is read: enough for a hundred thousand tensors."""


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file by key, read from its header alone.

    Raises:
        CheckpointError: the file is not a complete safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            shapes = {}
            for key in file.keys():  # noqa: SIM118 (not a dict)
                shapes[key] = tuple(file.get_slice(key).get_shape())
            return shapes
    except CheckpointError:
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is not a whole safetensors file: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        CheckpointError: the file is not JSON, is too large for a config, or has a repeated key or a non-finite number.
    """
    if not path.is_file():  # device files have no end of file
        raise CheckpointError(f"{str(path)!r} is not a file")
    size = path.stat().st_size
    if size > MOST_CONFIG_BYTES:
        raise CheckpointError(f"{str(path)!r} has {size:,} bytes, which is too large for a config")
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte-order mark
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is not JSON that veneer accepts: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(content).__name__}, not an object of config fields")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these pairs; raises ValueError if a key occurs twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} occurs twice")
    return content


def _finite(text: str) -> float:
    """A number from its digits; raises ValueError for NaN and infinities."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:30]} is not a finite number")
    return number


def check_header(path: Path) -> None:
    """Raise CheckpointError if the header of a safetensors file is longer than the file, or implausibly long.

    Call it before safetensors reads the file: parsing a header takes several times its size in memory.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        stated = int.from_bytes(file.read(8), "little")
    if size < 8 or stated > size - 8 or stated > MOST_HEADER_BYTES:
        raise CheckpointError(
            f"{str(path)!r} is not a whole safetensors file: it has {size:,} bytes but declares a header of {stated:,}"
        )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file; returns its tensors by key and its metadata.

    Raises:
        CheckpointError: the file is not a complete safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            # Cloned to get torch's own alignment: with the file's, matrix products can differ in the last bits.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, file.metadata() or {}
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, MemoryError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{str(path)!r} is not a whole safetensors file: {error}") from None


def computable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Upcast the tensors that torch cannot compute with; nothing is rounded.

    8-bit floats, for which torch has no arithmetic, become float32. If one tensor is float64, all floats do, because
    torch does not mix them in products; scalars such as kohya's alpha do not count.
    """
    import torch

    floats = {key: t for key, t in tensors.items() if t.is_floating_point()}
    has_doubles = any(t.dtype == torch.float64 for t in floats.values() if t.dim())
    upcast = {}
    for key, t in floats.items():
        if has_doubles:
            upcast[key] = t.to(torch.float64)
        elif t.element_size() == 1:
            upcast[key] = t.to(torch.float32)
    return tensors | upcast


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a pickle by key, with torch's `weights_only` reader, which runs no code.

    Raises:
        CheckpointError: the file holds anything other than tensors by name.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can fail anywhere in the reader
        reason = first_line(error)
        raise CheckpointError(f"{str(path)!r} is not a pickle of tensors: {reason}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} does not hold tensors by name")
    tensors = {}
    for key, t in content.items():
        is_tensor = isinstance(t, torch.Tensor) and t.layout == torch.strided
        if not is_tensor or not isinstance(key, str):
            raise CheckpointError(f"{str(path)!r} does not only hold tensors by name")
        tensors[key] = t.detach().clone().contiguous()
    return tensors
