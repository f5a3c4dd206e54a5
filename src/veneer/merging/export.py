"""Adapters and merged models as GGUF files for llama.cpp and Ollama, with limited memory, and adapters for servers.

An adapter becomes a LoRA in GGUF (`gguf_adapter.py`), or it is folded into its base model and the whole model is
written (`gguf_model.py`). `served.py` writes what vLLM and SGLang load.
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
from .served import PROGRAMS, export_served


def export(
    source: str,
    out: str | Path,
    model: str | None = None,
    *,
    to: str = "gguf",
    merged: bool = False,
    dtype: str | None = None,
    rank: int | None = None,
    ollama: bool = False,
    check_base: bool = True,
    progress: Progress = lambda done, of: None,
) -> Export:
    """Write an adapter, or a model with an adapter merged in, as a GGUF file, or an adapter for a server.

    Args:
        source: the directory or hub id of an adapter, or the directory of a model without one.
        out: a file that does not exist; for a server, a directory.
        model: the base; None: the one that the adapter names.
        to: "gguf", "vllm" or "sglang".
        merged: write the whole model.
        dtype: the type of the file; None: f32 for an adapter, f16 for a model.
        rank: the rank of the LoRA; None: exact, or at most 64 for a method without factors, and 512 for servers.
        ollama: also write a Modelfile beside a model.
        check_base: refuse a base other than the one that the adapter was trained on.

    Raises:
        ConfigError: the architecture, the tokenizer or the type cannot be exported.
        NotMergeable: the method has no form as an update of weights.
        VeneerError: something would be overwritten, or the disk is too small. Errors leave nothing behind.
    """
    out = Path(out)
    if to in PROGRAMS:
        if merged or ollama or dtype is not None:
            raise ConfigError(f"--to {to} writes an adapter in its own dtype, without --merged, --ollama and --dtype")
        if _is_model(source):
            raise ConfigError(f"{source!r} is a model, which {to} runs as it is; give an adapter")
        check_rank(rank)
        return export_served(source, out, to, model, rank, check_base, progress)
    if to != "gguf":
        known = ", ".join(("gguf", *PROGRAMS))
        raise ConfigError(f"--to {to!r} is not one of {known}; `veneer convert` has other layouts")
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
