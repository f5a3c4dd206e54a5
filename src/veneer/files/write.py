"""Atomic writing of files and directories: a crash leaves the old content or the new, never a part."""

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
from .lock import alone

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file with sorted metadata, which safetensors orders at random: equal content, equal bytes."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata)
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        metadata_items = header["__metadata__"].items()
        header["__metadata__"] = dict(sorted(metadata_items))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        file.seek(8)
        file.write(text.encode().ljust(size))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file; a crash leaves either the old file or the new one, complete."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` after the block, once its content is on the disk."""
    handle, temporary_name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(temporary_name)
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
    """A value that changes if the file at `path` is replaced by another."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _settle(directory: Path) -> None:
    """Flush a rename to the disk, if the system can synchronise directories (Windows cannot)."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_free(out: Path) -> None:
    """Raise VeneerError if writing the directory `out` would overwrite something."""
    if out.is_file():
        raise VeneerError(f"{str(out)!r} is a file; give a new directory, nothing is overwritten")
    if not out.is_dir():
        return
    names = sorted(path.name for path in out.iterdir())
    if names:
        first_names = ", ".join(names[:3])
        raise VeneerError(f"{str(out)!r} holds {first_names}; give a new directory, nothing is overwritten")


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Lock the directory `out`, which is to be written, for the block.

    Raises:
        VeneerError: another process writes into it, or something would be overwritten.
    """
    with alone(out):
        check_free(out)
        yield


@contextmanager
def appearing(out: Path, size: int = 0) -> Iterator[Path]:
    """A temporary directory that becomes `out` after the block; it is deleted if the block raises.

    Args:
        out: the directory; it must be missing or empty.
        size: bytes that will be written.

    Raises:
        VeneerError: something would be overwritten, or fewer than `size` bytes are free.
    """
    check_free(out)
    out = out.absolute()
    _make_room(out, size)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_new(path: Path) -> None:
    """Raise VeneerError if writing the file `path` would overwrite something."""
    if path.is_dir():
        raise VeneerError(f"{str(path)!r} is a directory; give the name of a new file")
    if path.exists():
        raise VeneerError(f"{str(path)!r} exists; give the name of a new file, nothing is overwritten")


@contextmanager
def appearing_file(path: Path, size: int = 0) -> Iterator[Path]:
    """A temporary file that becomes `path` after the block; it is deleted if the block raises.

    Args:
        path: a file that does not exist.
        size: bytes that will be written.

    Raises:
        VeneerError: something would be overwritten, or fewer than `size` bytes are free.
    """
    check_new(path)
    path = path.absolute()
    _make_room(path, size)
    with replacing(path) as temporary:
        yield temporary


def _make_room(out: Path, size: int) -> None:
    """Make the parent directory of `out`; raise VeneerError if fewer than `size` bytes are free there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise VeneerError(
            f"{str(out)!r} needs {size / 1e9:.1f} GB, but the disk has only {free / 1e9:.1f} GB left; make room"
        )


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def writing(what: str, folder: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn a failure to write into a TrainingError.

    Args:
        what: what is written, for the message.
        folder: the folder that is written to.
        errors: exceptions besides OSError that mean such a failure; torch.save raises RuntimeError without a reason.

    Raises:
        TrainingError: writing failed; the message gives the folder and the free space.
    """
    failures: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except failures as error:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        reason = first_line(error)
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise TrainingError(
            f"{what} could not be written into {str(folder)!r}: {reason} ({free:,} bytes are free there); make room "
            "and continue with --resume"
        ) from error
