"""GGUF files as base models: each is turned into a directory of transformers once, in veneer's cache.

The directory is named after the file's SHA-256, so that a copy of the file, or the file under another name, is not
converted again, and a changed file is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, first_line
from ...terminal import size as in_words
from ..write import appearing, write_atomically

ENDING = ".gguf"
ON_HUB = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)[:/](?P<file>[^:]+)")
"""A file of a repository on the hub: owner/name:file.gguf or owner/name/file.gguf."""
MARKER = "gguf.json"
FORM = 1
"""Changes with what the conversion writes; directories of another form are converted again."""


@dataclass(frozen=True)
class Origin:
    """The file that a directory in the cache was made from."""

    file: str
    """Its path, or its name on the hub."""
    sha256: str

    @property
    def name(self) -> str:
        """The file's name without directories."""
        return re.split(r"[/:]", self.file)[-1]


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return name.lower().endswith(ENDING) and not os.path.isdir(name)


def on_hub(name: str) -> tuple[str, str] | None:
    """(repository, file) for the name of a GGUF file on the hub; None for a path."""
    path = Path(name)
    if not is_gguf(name) or path.exists() or path.is_absolute() or name.startswith((".", "~")):
        return None
    found = ON_HUB.fullmatch(name)
    return None if found is None else (found["repository"], found["file"])


def directory_of(name: str, revision: str | None = None) -> Path:
    """The directory of transformers for a GGUF file, which is converted if it is not in the cache.

    Args:
        name: a path, or owner/name:file.gguf on the hub.
        revision: the revision on the hub.

    Raises:
        ConfigError: there is no such file, or its model cannot be loaded.
        CheckpointError: the file is damaged.
        VeneerError: the disk is too small.
    """
    place = on_hub(name)
    path = _downloaded(*place, revision) if place is not None else _local(name)
    origin = Origin(name if place is not None else str(path), _sha256(path))
    home = _home(origin.sha256)
    if not _is_complete(home):
        _convert(path, origin, home)
    if origin_of(str(home)) != origin:  # the same content under another name
        _mark(home, origin)
    return home


def already(name: str) -> Path | None:
    """The directory of a GGUF file that was converted before and has not changed; None without one."""
    place = on_hub(name)
    path = Path(name).expanduser() if place is None else _downloaded_before(*place)
    sha256 = _known(path) if path.is_file() else None
    if sha256 is None or not _is_complete(_home(sha256)):
        return None
    return _home(sha256)


def origin_of(model: str) -> Origin | None:
    """The GGUF file of a base model; None for other models.

    Args:
        model: a directory in the cache, or the name of a GGUF file that was converted before.
    """
    directory = already(model) if is_gguf(model) else Path(model)
    if directory is None or directory.parent != _folder():
        return None
    marker = _read(directory / MARKER)
    return Origin(marker["file"], marker["sha256"]) if "file" in marker and "sha256" in marker else None


# Files


def _local(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path.absolute()
    there = ""
    if path.parent.is_dir():
        names = sorted(entry.name for entry in path.parent.iterdir() if is_gguf(entry.name))
        there = f"; GGUF files there: {', '.join(names[:5])}" if names else "; the directory holds no GGUF file"
    raise ConfigError(f"there is no GGUF file {name!r}{there}")


def _downloaded(repository: str, file: str, revision: str | None) -> Path:
    """The path of a file of the hub in the hub's cache, downloaded if it is not there."""
    from huggingface_hub import hf_hub_download

    from .. import locate

    arguments = locate.on_hub(repository, file, revision or "main").arguments
    try:
        return Path(hf_hub_download(repository, file, revision=revision, **arguments))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file!r} of {repository!r} could not be downloaded: {first_line(error)}") from None


def _downloaded_before(repository: str, file: str) -> Path:
    """The path of a file in the hub's cache, which need not be there."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file)
    return Path(cached) if isinstance(cached, str) else Path(file)


def _sha256(path: Path) -> str:
    """The SHA-256 of a file, read again only if its size or its time has changed."""
    known = _known(path)
    if known is not None:
        return known
    from ..pull import sha256_of

    status = path.stat()
    with path.open("rb") as file:
        sha256 = sha256_of(file)
    stamp = {"size": status.st_size, "time": status.st_mtime_ns, "sha256": sha256}
    _stamp(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(_stamp(path), json.dumps(stamp).encode())
    return sha256


def _known(path: Path) -> str | None:
    """The SHA-256 that was noted for a file of this path, size and time."""
    stamp = _read(_stamp(path))
    status = path.stat()
    is_same = stamp.get("size") == status.st_size and stamp.get("time") == status.st_mtime_ns
    return stamp.get("sha256") if is_same else None


# The cache


def _folder() -> Path:
    from ..pull import cache_dir

    return cache_dir() / "gguf"


def _home(sha256: str) -> Path:
    return _folder() / sha256


def _stamp(path: Path) -> Path:
    """The file that notes the SHA-256 of a path."""
    key = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogatepass")).hexdigest()
    return _folder() / "known" / f"{key}.json"


def _convert(path: Path, origin: Origin, home: Path) -> None:
    from ..pull import console, waiting_lock
    from .directory import Plan

    home.parent.mkdir(parents=True, exist_ok=True)
    with waiting_lock(home):
        if _is_complete(home):  # another process may have finished it while this one waited
            return
        plan = Plan(path)
        console.print(f"reading {path.name} once, {in_words(plan.size)} in the cache", highlight=False)
        if home.exists():
            shutil.rmtree(home)
        with appearing(home, plan.size) as folder:
            plan.write(folder)
            _mark(folder, origin)


def _mark(folder: Path, origin: Origin) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != MARKER}
    marker = {"form": FORM, "file": origin.file, "sha256": origin.sha256, "files": sizes}
    write_atomically(folder / MARKER, (json.dumps(marker, indent=2) + "\n").encode())


def _is_complete(home: Path) -> bool:
    """Whether a directory holds every file that this form of the conversion wrote, at its full size."""
    marker = _read(home / MARKER)
    files = marker.get("files")
    if marker.get("form") != FORM or not isinstance(files, dict):
        return False
    for name, size in files.items():
        path = home / name
        if not path.is_file() or path.stat().st_size != size:
            return False
    return True


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
