"""An adapter's files, in a directory or on the hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, VeneerError, first_line, nearest, printable
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


def find_weights(source: str | Path, *, allow_pickle: bool = False, **hub: Any) -> Path:
    """The tensor file of an adapter. Where there is only a pickle, it is that or an error, as `allow_pickle` says."""
    try:
        return find_file(source, WEIGHTS_NAME, **hub)
    except CheckpointError:
        if allow_pickle:
            return find_file(source, PICKLE_NAME, **hub)
        pickle = Path(source) / (hub.get("subfolder") or "") / PICKLE_NAME
        if pickle.is_file():
            raise CheckpointError(
                f"{str(pickle)!r} is a pickle, which can run code when it is loaded; get the adapter as "
                f"{WEIGHTS_NAME}, or pass allow_pickle=True, which reads tensors and nothing else from it"
            ) from None
        raise


def _contents(directory: Path) -> str:
    if not directory.is_dir():
        return "there is no such directory"
    names = sorted(printable(p.name, 80) for p in directory.iterdir())
    return f"it holds {', '.join(names[:20]) or 'nothing'}" + (
        f" and {len(names) - 20} more" if len(names) > 20 else ""
    )


def _download(repository: str, name: str, *, subfolder: str, **hub: Any) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, subfolder=None if subfolder == "." else subfolder, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"{repository!r} is no local directory, and {name} could not be had from the hub: {reason}"
        ) from error
