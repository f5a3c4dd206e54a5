"""Files: found in a directory or on the hub, read as JSON, written so that a crash loses nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, VeneerError, nearest, printable

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
MOST_CONFIG_BYTES = 10_000_000
MOST_HEADER_BYTES = 16_000_000
"""Of a safetensors file: room for a hundred thousand tensors."""
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


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors by key, from its header alone.

    Raises:
        CheckpointError: it is none, or not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except CheckpointError:
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is not a whole safetensors file: {error}") from None


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
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{repository!r} is no local directory, and {name} could not be had from the hub: {reason}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it is none, is too large for a config, or says something twice or with a number that is none.
    """
    if not path.is_file():  # a device would never end
        raise CheckpointError(f"{str(path)!r} is no file")
    size = path.stat().st_size
    if size > MOST_CONFIG_BYTES:
        raise CheckpointError(f"{str(path)!r} has {size:,} bytes, which no config has")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_once, parse_constant=_number, parse_float=_number)
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is not JSON that can be trusted: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(content).__name__}, not an object of config fields")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return content


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:30]} is no number")
    return number


def check_header(path: Path) -> None:
    """Raise CheckpointError where a safetensors file states a header that it does not hold, or that nobody would write.

    Before anything is read: the header is parsed in memory, and takes several times its size there.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        stated = int.from_bytes(file.read(8), "little")
    if size < 8 or stated > size - 8 or stated > MOST_HEADER_BYTES:
        raise CheckpointError(
            f"{str(path)!r} is not a whole safetensors file: it has {size:,} bytes and states a header of {stated:,}"
        )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by key, metadata) of a safetensors file.

    Raises:
        CheckpointError: it is none, or not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            # cloned into memory of torch's own alignment: in the file's, products can differ in the last bits
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, file.metadata() or {}
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, MemoryError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{str(path)!r} is not a whole safetensors file: {error}") from None


def computable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floats of 8 bits, for which torch has no arithmetic, as 32; and all as 64 where some are, which it does not mix.

    Nothing is rounded. A lone number (kohya's alpha) goes with floats of any width.
    """
    import torch

    floats = {key: t for key, t in tensors.items() if t.is_floating_point()}
    widest = max((t.element_size() for t in floats.values() if t.dim()), default=0)
    narrow = {key: t for key, t in floats.items() if t.element_size() == 1 or t.element_size() < widest == 8}
    return tensors | {key: t.to(torch.float64 if widest == 8 else torch.float32) for key, t in narrow.items()}


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


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors by key of a pickled file, by torch's reader that builds tensors and nothing else.

    Raises:
        CheckpointError: it holds anything but tensors by name.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can fail anywhere in the reader
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{str(path)!r} is no pickle of tensors alone: {reason}") from None
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(t, torch.Tensor) and t.layout == torch.strided for key, t in content.items()
    ):
        raise CheckpointError(f"{str(path)!r} holds other things than tensors by name")
    return {key: t.detach().clone().contiguous() for key, t in content.items()}


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
