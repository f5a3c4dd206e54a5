"""Adapters and merged models as GGUF files for llama.cpp and Ollama, with limited memory.

An adapter becomes a LoRA in GGUF (`gguf_adapter.py`), or it is folded into its base model and the whole model is
written (`gguf_model.py`).
"""

from __future__ import annotations

from pathlib import Path

from ..core.config import CONFIG_NAME
from ..errors import ConfigError
from ..files.gguf.file import FLOATS, Progress, check_dtype
from ..files.gguf.modelfile import MODELFILE
from ..files.lock import alone
from ..files.pull import resolve
from ..files.write import check_new
from ..model.to_lora import check_rank
from .exported import Export
from .gguf_adapter import export_adapter
from .gguf_model import Model


def export(
    source: str,
    out: str | Path,
    model: str | None = None,
    *,
    merged: bool = False,
    dtype: str | None = None,
    rank: int | None = None,
    ollama: bool = False,
    check_base: bool = True,
    progress: Progress = lambda done, of: None,
) -> Export:
    """Write an adapter, or a model with an adapter merged in, as a GGUF file.

    Args:
        source: the directory or hub id of an adapter, or the directory of a model without one.
        out: a file that does not exist.
        model: the base; None: the one that the adapter names.
        merged: write the whole model.
        dtype: the type of the file; None: f32 for an adapter, f16 for a model.
        rank: the rank of the LoRA; None: exact, or at most 64 for a method without factors.
        ollama: also write a Modelfile beside a model.
        check_base: refuse a base other than the one that the adapter was trained on.

    Raises:
        ConfigError: the architecture, the tokenizer or the type cannot be exported.
        NotMergeable: the method has no form as an update of weights.
        VeneerError: something would be overwritten, or the disk is too small. Errors leave nothing behind.
    """
    out = Path(out)
    is_model = _is_model(source)
    check_new(out)
    if ollama and not (merged or is_model):
        raise ConfigError("--ollama needs --merged: current Ollama takes no adapters in GGUF")
    if ollama:
        check_new(out.parent / MODELFILE)
    if model is not None and is_model:
        raise ConfigError(f"--model is the base of an adapter, and {source!r} is a model itself")
    if rank is not None and (merged or is_model):
        raise ConfigError("--rank is the rank of an adapter's LoRA; a merged model has none")
    if merged or is_model:
        check_dtype(dtype or "f16")
        with alone(out):
            return Model(source, is_model, model, check_base).write(out, dtype or "f16", ollama, progress)
    check_dtype(dtype or "f32", FLOATS)
    check_rank(rank)
    with alone(out):
        return export_adapter(source, out, model, dtype or "f32", rank, check_base, progress)


def _is_model(source: str) -> bool:
    """Whether a source is a model in a directory, and not an adapter."""
    directory = Path(resolve(source))
    return (directory / "config.json").is_file() and not (directory / CONFIG_NAME).is_file()
