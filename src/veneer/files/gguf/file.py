"""Writing a GGUF file with gguf-py, one tensor at a time and atomically."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import CheckpointError, ConfigError, nearest
from ..write import appearing_file

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from torch import Tensor

Metadata = dict[str, Any]
"""Booleans, whole numbers, floats, text, lists of one of these, or NumPy arrays of unsigned numbers, by key."""
Progress = Callable[[int, int], None]
"""Called with the number of items done and of all items."""
FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q5_1": "MOSTLY_Q5_1",
    "q5_0": "MOSTLY_Q5_0",
    "q4_1": "MOSTLY_Q4_1",
    "q4_0": "MOSTLY_Q4_0",
}
"""The types that gguf-py writes, and their names in llama.cpp's list of file types."""
FLOATS = ("f32", "f16", "bf16")
SMALL = ("q5_1", "q5_0", "q4_1", "q4_0")
"""Types of less than 8 bits."""
IN_F32 = ("_norm.weight", "position_embd.weight", "rope_freqs.weight")
"""Endings of tensors that llama.cpp computes with in fp32."""
HEADER = 1 << 20
"""Bytes of the header besides the vocabulary, at most; for the check of the free space."""


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    value: Callable[[], Tensor]
    """Gives the tensor, in this shape and any floating-point dtype."""

    @property
    def bytes(self) -> int:
        from gguf import GGML_QUANT_SIZES

        entries, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // entries * size


def check_dtype(dtype: str, allowed: Sequence[str] = tuple(FILE_TYPES)) -> None:
    """Raise ConfigError for a type that cannot be written; K-quants get the way to make them."""
    if dtype in allowed:
        return
    if dtype.startswith(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq", "k")):
        raise ConfigError(
            f"--dtype {dtype}: these types are llama.cpp's own; export with --dtype f16, then run `llama-quantize "
            f"model-f16.gguf model.gguf {dtype.upper()}`"
        )
    raise ConfigError(f"--dtype {dtype!r} is not one of {', '.join(allowed)}{nearest(dtype, allowed)}")


def type_of(name: str, shape: Sequence[int], dtype: str, output: str) -> GGMLQuantizationType:
    """The type of a tensor in a file of a type.

    Vectors and what llama.cpp computes with in fp32 stay in fp32. With less than 8 bits the output matrix, which is
    the embedding if the two are tied, has 8 bits; llama-quantize gives it more bits too. Rows that are not whole blocks
    are in fp16.

    Args:
        output: the name of the output matrix.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2 or name.endswith(IN_F32) or not name.endswith((".weight", ".lora_a", ".lora_b")):
        return GGMLQuantizationType.F32
    if dtype in SMALL and name == output:
        dtype = "q8_0"
    wanted = GGMLQuantizationType[dtype.upper()]
    entries, _ = GGML_QUANT_SIZES[wanted]
    return GGMLQuantizationType.F16 if shape[-1] % entries else wanted


def rounded(name: str, value: Tensor, type_: GGMLQuantizationType) -> np.ndarray:
    """A tensor in a type of GGUF, as the bytes of the file.

    Raises:
        CheckpointError: the values are not finite, or too large for fp16.
    """
    from gguf import GGMLQuantizationType, quantize

    exact = value.detach().float().contiguous().numpy()
    if not np.isfinite(exact).all():
        raise CheckpointError(f"{name} holds values that are not finite")
    with np.errstate(over="ignore"):
        stored = quantize(exact, type_)
    if type_ == GGMLQuantizationType.F16 and not np.isfinite(stored).all():
        raise CheckpointError(
            f"{name} holds values up to {np.abs(exact).max():.3g}, too large for f16; use bf16 or f32"
        )
    return stored


def write(
    path: Path,
    architecture: str,
    dtype: str,
    metadata: Metadata,
    tensors: Sequence[Planned],
    progress: Progress = lambda done, of: None,
    seen: Callable[[Planned, Tensor, np.ndarray], None] = lambda planned, value, stored: None,
) -> int:
    """Write a GGUF file that appears complete or not at all; returns its size in bytes.

    Args:
        architecture: llama.cpp's name.
        dtype: the type of the file, a key of `FILE_TYPES`.
        progress: called after each tensor.
        seen: called with each tensor, its value and its stored form.

    Raises:
        VeneerError: the file exists, or the disk is too small.
        CheckpointError: a tensor's values cannot be stored.
    """
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    size = HEADER + sum(planned.bytes for planned in tensors)
    with appearing_file(path, size) as temporary:
        writer = GGUFWriter(temporary, architecture)
        try:
            for key, value in metadata.items():
                _add(writer, key, value)
            writer.add_file_type(LlamaFileType[FILE_TYPES[dtype]])
            writer.add_quantization_version(GGML_QUANT_VERSION)
            for planned in tensors:
                writer.add_tensor_info(
                    planned.name, planned.shape, np.dtype(np.float32), planned.bytes, raw_dtype=planned.type
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, planned in enumerate(tensors, 1):
                value = planned.value()
                assert tuple(value.shape) == planned.shape, (planned.name, value.shape, planned.shape)
                stored = rounded(planned.name, value, planned.type)
                writer.write_tensor_data(stored)
                seen(planned, value, stored)
                progress(done, len(tensors))
        finally:
            writer.close()
        return temporary.stat().st_size


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add one entry of the metadata, with the type that llama.cpp reads."""
    from gguf import GGUFValueType

    if isinstance(value, np.ndarray):
        sub_type = GGUFValueType[value.dtype.name.upper()]
        writer.add_key_value(key, value.tolist(), GGUFValueType.ARRAY, sub_type)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
