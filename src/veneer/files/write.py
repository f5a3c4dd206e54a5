"""Writing files so that a crash leaves the old content or the new, never a part."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TrainingError, VeneerError, first_line

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file: the same bytes for the same content, where safetensors orders metadata at random."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata)
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


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
    _settle(path.parent)


def identity(path: Path) -> tuple[int, int]:
    """What is another when another file has taken this place."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _settle(directory: Path) -> None:
    """The rename itself reaches the disk, where directories can be synchronised (not on Windows)."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_free(out: Path) -> None:
    """Raise VeneerError where writing a directory would overwrite something."""
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        what = "is a file" if out.is_file() else f"holds {', '.join(sorted(p.name for p in out.iterdir())[:3])}"
        raise VeneerError(f"{str(out)!r} {what}; give a new directory, nothing is overwritten")


@contextmanager
def appearing(out: Path, size: int = 0) -> Iterator[Path]:
    """A temporary directory that becomes `out`, new or empty, at the end; after an error nothing is left of it.

    Raises:
        VeneerError: something would be overwritten, or fewer than `size` bytes are free.
    """
    check_free(out)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise VeneerError(f"{str(out)!r} takes {size / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB left")
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def writing(what: str, folder: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn a failure to write into one error.

    Args:
        errors: what else than OSError is such a failure; torch.save raises RuntimeError, and does not say why.

    Raises:
        TrainingError: it could not be written; names the folder and the room that is left there.
    """
    failures: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except failures as error:
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise TrainingError(
            f"{what} could not be written into {str(folder)!r}: {reason} ({free:,} bytes are free there); make room, "
            "and go on with --resume"
        ) from error
