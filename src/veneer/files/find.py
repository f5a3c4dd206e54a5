"""Finding the files of an adapter in a local directory or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, VeneerError, first_line, nearest, printable
from .read import PICKLE_NAME, WEIGHTS_NAME

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
"""Arguments that a download from the hub accepts."""


def check_hub_arguments(names: Iterable[str]) -> None:
    """Raise VeneerError for a name that is not an argument of a download."""
    for name in names:
        if name not in HUB_ARGUMENTS:
            raise VeneerError(f"unknown argument {name!r}{nearest(name, HUB_ARGUMENTS)}")


def find_file(source: str | Path, name: str, **hub: Any) -> Path:
    """Find a file in a local directory or, if there is no such directory, in a hub repository.

    Raises:
        CheckpointError: the file is in neither.
    """
    root = Path(source)
    subfolder = hub.pop("subfolder", None) or ""
    directory = root / subfolder
    file = directory / name
    if file.is_file():
        return file
    is_local = root.exists() or root.is_absolute() or str(source).startswith(".")
    if is_local:
        raise CheckpointError(f"{str(directory)!r} holds no {name}: {_contents(directory)}")
    relative = directory.relative_to(root)
    return _download(str(source), name, subfolder=str(relative), **hub)


def find_weights(source: str | Path, *, allow_pickle: bool = False, **hub: Any) -> Path:
    """Find the tensor file of an adapter; a pickle only if there is nothing else and `allow_pickle` is true."""
    try:
        return find_file(source, WEIGHTS_NAME, **hub)
    except CheckpointError:
        if allow_pickle:
            return find_file(source, PICKLE_NAME, **hub)
        subfolder = hub.get("subfolder") or ""
        pickle = Path(source) / subfolder / PICKLE_NAME
        if pickle.is_file():
            raise CheckpointError(
                f"{str(pickle)!r} is a pickle, which can run code when it is loaded; get the adapter as "
                f"{WEIGHTS_NAME}, or pass allow_pickle=True, which reads tensors and nothing else from it"
            ) from None
        raise


def _contents(directory: Path) -> str:
    """A description of a directory's content for an error message."""
    if not directory.is_dir():
        return "there is no such directory"
    names = sorted(printable(path.name, 80) for path in directory.iterdir())
    shown = ", ".join(names[:20]) or "nothing"
    if len(names) > 20:
        shown += f" and {len(names) - 20} more"
    return f"it holds {shown}"


def _download(repository: str, name: str, *, subfolder: str, **hub: Any) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from .locate import on_hub

    folder = None if subfolder == "." else subfolder
    if hub.keys() <= {"revision"}:
        path = name if folder is None else f"{folder}/{name}"
        try:
            hub |= on_hub(repository, path, hub.get("revision") or "main").arguments
        except (ConfigError, HFValidationError) as error:
            raise CheckpointError(first_line(error)) from error
    try:
        return Path(hf_hub_download(repository, name, subfolder=folder, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"{repository!r} is not a local directory, and {name} could not be downloaded from the hub: {reason}"
        ) from error
