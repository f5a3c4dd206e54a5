"""Files: found in a directory or on the hub, read as JSON, written so that a crash loses nothing."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError, VeneerError, nearest

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
HUB_ARGUMENTS = (
    "subfolder",
    "revision",
    "token",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "repo_type",
)
"""What a download from the hub can be told."""


def check_hub_arguments(given: Iterable[str]) -> None:
    for name in given:
        if name not in HUB_ARGUMENTS:
            raise VeneerError(f"unknown argument {name!r}{nearest(name, HUB_ARGUMENTS)}")


def find_file(source: str | Path, name: str, **hub: Any) -> Path:
    """A file of a local directory or, when there is no such directory, of a hub repository."""
    directory = Path(source) / (hub.pop("subfolder", None) or "")
    if (directory / name).is_file():
        return directory / name
    if Path(source).exists() or Path(source).is_absolute() or str(source).startswith("."):
        raise CheckpointError(f"{str(directory)!r} holds no {name}: {_contents(directory)}")
    return _download(str(source), name, subfolder=str(directory.relative_to(source)), **hub)


def find_weights(source: str | Path, **hub: Any) -> Path:
    """The tensor file of an adapter. Where there is only a pickle, the error says what to do with it."""
    try:
        return find_file(source, WEIGHTS_NAME, **hub)
    except CheckpointError:
        pickle = Path(source) / (hub.get("subfolder") or "") / PICKLE_NAME
        if pickle.is_file():
            raise CheckpointError(
                f"{str(pickle)!r} is a pickle, which can run code when it is loaded; convert it to {WEIGHTS_NAME} "
                "with a tool you trust"
            ) from None
        raise


def _contents(directory: Path) -> str:
    if not directory.is_dir():
        return "there is no such directory"
    return f"it holds {', '.join(sorted(p.name for p in directory.iterdir())) or 'nothing'}"


def _download(repository: str, name: str, *, subfolder: str, **hub: Any) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, subfolder=None if subfolder == "." else subfolder, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{repository!r} is no local directory, and {name} could not be had from the hub: {reason}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(content).__name__}, not an object of config fields")
    return content


def write_atomically(path: Path, content: bytes) -> None:
    """A crash leaves either the old file or the new one, whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write beside `path`, which takes its place once it is whole and on the disk."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
